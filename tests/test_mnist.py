"The benchmark on MNIST, with invented images in files of its format"
import gzip, struct
import numpy as np, pytest, torch

from benchmarks import mnist



def write_idx(file, array):
    "Magic number (two zeros, 8 for bytes, the number of axes), the sizes, the bytes"
    head = struct.pack('>BBBB', 0, 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
    with gzip.open(file, 'wb') as f: f.write(head + array.astype('uint8').tobytes())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('mnist'), np.random.default_rng(0)
    for images,labels,n in (mnist.FILES[:2] + [300], mnist.FILES[2:] + [100]):
        write_idx(folder/f'{images}.gz', rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder/f'{labels}.gz', np.arange(n) % 10)
    return folder


def test_files_are_read(data):
    x, y, x_test, y_test = mnist.load_mnist(data)
    assert x.shape == (300, 1, 28, 28) and x_test.shape == (100, 1, 28, 28)
    assert y.tolist() == [i % 10 for i in range(300)] and y_test[-1] == 9
    first = np.random.default_rng(0).integers(0, 256, (300, 28, 28))[0, 0, 0]
    assert x[0, 0, 0, 0].item() == pytest.approx((first/255 - 0.1307)/0.3081, rel=1e-6)


def test_batches_hold_each_image_once():
    x = torch.arange(10)
    for shuffle in (False, True):
        batches = mnist.Batches(x, -x, 4, shuffle)
        seen = list(batches)
        assert len(batches) == len(seen) == 3 and sorted(torch.cat([a for a,_ in seen]).tolist()) == x.tolist()
        assert all(torch.equal(a, -b) for a,b in seen)


@pytest.fixture(scope='module')
def table(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('results')/'mnist.csv'
    mnist.main(['--data', str(data), '--quick', '--out', str(out)])
    return out


def test_every_row_is_there(table):
    _, found = mnist.read_results(table)
    assert list(found) == ['LeNet-300-100', 'LeNet-5']
    assert all(list(kinds) == list(mnist.KINDS) for kinds in found.values())
    for kinds in found.values():
        for (row,) in kinds.values():
            assert all(row[k] for k in mnist.FIELDS) and 0 <= float(row['accuracy']) <= 100 == int(row['of'])


def test_sizes_are_those_of_the_literature(table):
    found  = mnist.read_results(table)[1]
    weight = {'LeNet-300-100': 266_200, 'LeNet-5': 430_500}
    biases = {'LeNet-300-100': 410, 'LeNet-5': 580}
    for network,kinds in found.items():
        dense = kinds['dense'][0]
        assert int(dense['params']) == weight[network] + biases[network]
        for s in (90, 95, 98):
            row = kinds[f'{s} % of weights pruned'][0]
            left = weight[network] - s*weight[network]//100
            assert int(row['nonzero']) <= left + biases[network] and int(row['nonzero']) >= left
            assert int(row['sparse_file']) < int(row['file']) and row['multiply_adds'] == dense['multiply_adds']
    half = found['LeNet-300-100']['half of filters and units removed'][0]
    assert int(half['multiply_adds']) == 784*150 + 150*50 + 50*10
    half = found['LeNet-5']['half of filters and units removed'][0]
    assert int(half['multiply_adds']) == 10*25*24*24 + 25*10*25*8*8 + 400*250 + 250*10


def test_markdown(table):
    text = mnist.markdown(table)
    for kind in mnist.KINDS: assert text.count(f'| {kind} |') == 2
    for source,*_ in mnist.PUBLISHED: assert source in text
    for lines in text.split('\n\n'):
        if lines.startswith('|'): assert len({l.count('|') for l in lines.splitlines()}) == 1


def test_published_numbers():
    "Errors in percent as the tables print them: 1.64 and 1.59, 0.80 and 0.77 (Han); 1.7, 1.6, 2.4, 0.9, 0.8 (SNIP)"
    errors = [(network, round(100 - dense, 2), round(100 - reached, 2))
              for _,network,_,reached,dense,_ in mnist.PUBLISHED if reached]
    assert errors == [('LeNet-300-100', 1.64, 1.59), ('LeNet-300-100', 1.7, 1.6), ('LeNet-300-100', 1.7, 2.4),
                      ('LeNet-5', 0.8, 0.77), ('LeNet-5', 0.9, 0.8)]
