"""Half of the filters of real architectures removed, by this library and by Torch-Pruning:
`python -m benchmarks.networks`.

Ours: `Sparsifier(model, 'filter', coupled=True)` at 50 % for all convolutions and linear layers, then `thin`. Nothing
is said about the network. Torch-Pruning: the recipe of its timm example: `BasePruner`, `GroupMagnitudeImportance`,
ratio 0.5, `num_heads` for every module that has `qkv` and `num_heads`, fused attention off; `head_dim` (and timm's
`attn_dim`) are set afterwards. The layers that make the output are ignored.

Each job has a process and `--limit` seconds of CPU for pruning. Weights are random, and so are norms and layer scales,
which would otherwise hide differences. A pruned network is `exact` if it computes in float64, to a relative 1e-6, what
the whole network computes with the removed channels set to zero; if not, it is `another function`. Torch-Pruning does
not promise the same function: one trains after it."""
import argparse, copy, csv, multiprocessing, os, resource, signal, time, warnings
os.environ['TIMM_FUSED_ATTN'] = '0'  # before timm is imported, as in Torch-Pruning's example
from collections import Counter
from datetime import date
from pathlib import Path
import timm, torch, torch.nn as nn
import torch_pruning as tp
from torchvision.models import detection, segmentation
from fasterai_clone.model.run import tensors_in
from fasterai_clone.prune.all import thin
from fasterai_clone.sparse.all import Sparsifier
from .timing import installed, machine

SPARSITY = 50
FIELDS = 'network parameters contestant seed date result left difference seconds why'.split()
COMMON = 'python torch torchvision timm torch-pruning sparsity limit'.split()  # the same for all rows of a file
TIMM   = '''ghostnet_050 ese_vovnet19b_slim efficientvit_m0 edgenext_xx_small mobilevit_xxs mobilevitv2_050
            convnext_atto convnextv2_atto fastvit_t8 mixnet_s efficientvit_b0 levit_128s
            levit_conv_128s deit_tiny_patch16_224 eva02_tiny_patch14_224 ese_vovnet19b_dw
            maxvit_rmlp_pico_rw_256 ghostnetv2_100 repvgg_a0 resnest14d coatnet_pico_rw_224
            skresnet18 dpn48b dpn68 hrnet_w18_small nf_resnet26 nfnet_l0 resnetv2_50
            swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tresnet_m inception_v4
            beit_base_patch16_224'''.split()


# Networks: each is made by a function of no arguments; its layers whose outputs leave the network are found by name

class MTCNN(nn.Module):
    """A cascade network of Zhang et al. 2016: convolutions with PReLU, then a dense layer (or none), and a head for
    each output"""
    def __init__(self, convs, pools, dense, heads):
        super().__init__()
        layers, i = [], 3
        for (o,k),p in zip(convs, pools):
            layers += [nn.Conv2d(i, o, k), nn.PReLU(o), nn.MaxPool2d(p, 2, ceil_mode=True) if p else nn.Identity()]
            i = o
        if dense: layers += [nn.Flatten(), nn.Linear(*dense), nn.PReLU(dense[1])]
        self.body  = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(dense[1], o) if dense else nn.Conv2d(i, o, 1) for o in heads)

    def forward(self, x):
        x = self.body(x)
        return [self.heads[0](x).softmax(1), *[head(x) for head in self.heads[1:]]]

class OneStage(nn.Module):
    "A detector up to scores and boxes: what follows chooses among them"
    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
    def forward(self, x): return self.head([*self.backbone(x).values()])

class TwoStages(nn.Module):
    "An R-CNN for two fixed boxes, up to scores, boxes and key points"
    def __init__(self, detector):
        super().__init__()
        self.backbone, self.rpn, self.roi = detector.backbone, detector.rpn.head, detector.roi_heads
    def forward(self, x):
        found, size = self.backbone(x), [tuple(x.shape[-2:])]
        boxes = [torch.tensor([[4., 4., 60., 90.], [10., 20., 120., 100.]], dtype=x.dtype)]
        out   = [self.rpn([*found.values()]),
                 self.roi.box_predictor(self.roi.box_head(self.roi.box_roi_pool(found, boxes, size)))]
        if self.roi.has_keypoint():
            features = self.roi.keypoint_roi_pool(found, boxes, size)
            out.append(self.roi.keypoint_predictor(self.roi.keypoint_head(features)))
        return out

def resnet18_fpn(**kwargs):
    return detection.backbone_utils.resnet_fpn_backbone(backbone_name='resnet18', weights=None,
                                                        trainable_layers=5, **kwargs)
def random(make, **kwargs): return make(weights=None, weights_backbone=None, **kwargs)

OTHERS = {  # name → (makes it, size of the image, names of the layers that make its output)
    'mtcnn_pnet': (lambda: MTCNN([(10, 3), (16, 3), (32, 3)], [2, 0, 0], None, (2, 4)), 12, 'heads'),
    'mtcnn_rnet': (lambda: MTCNN([(28, 3), (48, 3), (64, 2)], [3, 3, 0], (576, 128), (2, 4)), 24, 'heads'),
    'mtcnn_onet': (lambda: MTCNN([(32, 3), (64, 3), (64, 3), (128, 2)], [3, 3, 2, 0], (1152, 256), (2, 4, 10)), 48,
                   'heads'),
    'tv_lraspp': (lambda: random(segmentation.lraspp_mobilenet_v3_large), 128, 'low_classifier high_classifier'),
    'tv_deeplabv3_mobilenet': (lambda: random(segmentation.deeplabv3_mobilenet_v3_large), 128, 'classifier.4'),
    'tv_fcn_r50': (lambda: random(segmentation.fcn_resnet50), 128, 'classifier.4'),
    'tv_ssdlite320': (lambda: OneStage(random(detection.ssdlite320_mobilenet_v3_large)), 320,
                      'module_list.0.1 module_list.1.1 '
                      'module_list.2.1 module_list.3.1 module_list.4.1 module_list.5.1'),
    'tv_retinanet_r18': (lambda: OneStage(detection.RetinaNet(resnet18_fpn(), 91)), 128, 'cls_logits bbox_reg'),
    'tv_fasterrcnn_mobilenet': (lambda: TwoStages(random(detection.fasterrcnn_mobilenet_v3_large_320_fpn)), 128,
                                'rpn.cls_logits rpn.bbox_pred cls_score bbox_pred'),
    'tv_fasterrcnn_r18_frozen': (lambda: TwoStages(detection.FasterRCNN(resnet18_fpn(), 91)), 128,
                                 'rpn.cls_logits rpn.bbox_pred cls_score bbox_pred'),
    'tv_keypointrcnn': (lambda: TwoStages(random(detection.keypointrcnn_resnet50_fpn)), 128,
                        'rpn.cls_logits rpn.bbox_pred cls_score bbox_pred kps_score_lowres')}
NAMES = [*OTHERS, *TIMM]

def made(name, seed):
    "The network in eval mode, an image for it, and its output layers"
    torch.manual_seed(seed)
    if name in OTHERS: make, size, ends = OTHERS[name]
    else: make, size, ends = lambda: timm.create_model(name), None, ''
    model = make().eval()
    size  = size or model.default_cfg['input_size'][-1]
    last  = [m for n,m in model.named_modules() if any(f'.{n}'.endswith(f'.{e}') or f'.{e}.' in f'.{n}'
                                                       for e in ends.split())]
    if hasattr(model, 'get_classifier'): last.append(model.get_classifier())
    last += [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features
             == getattr(model, 'num_classes', None)]
    return lively(model), torch.randn(1, 3, size, size), [m for m in last
                                                          if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]

@torch.no_grad()
def lively(model):
    "Random values for all vectors that are constant: norms, biases, layer scales"
    for n,p in [*model.named_parameters(), *model.named_buffers()]:
        if not p.is_floating_point() or p.numel() < 2 or p.min() != p.max(): continue
        if n.endswith(('bias', 'running_mean')): p.normal_(std=0.1)
        else: p.uniform_(0.5, 1.5)
    return model


# Pruned by each: the smaller network, and the whole one with the removed channels zero

def ours(model, x, last):
    Sparsifier(model, 'filter', layer_type=(nn.Conv1d, nn.Conv2d, nn.Linear), coupled=True,
               example_inputs=x).sparsify_model(SPARSITY)
    return thin(model, example_inputs=x), model

def theirs(model, x, last):
    small, names = copy.deepcopy(model), {}
    for (n,m),twin in zip(model.named_modules(), small.modules()): names[twin] = n, m
    heads   = {m.qkv: m.num_heads for m in small.modules() if hasattr(m, 'num_heads') and hasattr(m, 'qkv')}
    ignored = [twin for twin,(_,m) in names.items() if any(m is l for l in last)]
    pruner  = tp.pruner.BasePruner(small, x, tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=SPARSITY/100,
                                   num_heads=heads, ignored_layers=ignored)
    for group in pruner.step(interactive=True):
        for dep,channels in group:
            if dep.layer in names and 'out_channels' in dep.pruning_fn.__name__: zero(names[dep.layer][1], channels)
        group.prune()
    for m in small.modules():
        if not (hasattr(m, 'num_heads') and hasattr(m, 'qkv')): continue
        m.num_heads = heads[m.qkv]
        m.head_dim  = m.qkv.out_features // (3*m.num_heads)
        if hasattr(m, 'attn_dim'): m.attn_dim = m.num_heads * m.head_dim
    return small, model

@torch.no_grad()
def zero(layer, channels):
    axis = 1 if getattr(layer, 'transposed', False) else 0
    for n,p in layer.named_parameters(recurse=False): p.movedim(axis if p.ndim > 1 else 0, 0)[channels] = 0

CONTESTANTS = dict(ours=ours, theirs=theirs)
SHOWN       = dict(ours='fasterai_clone', theirs='Torch-Pruning')

@torch.no_grad()
def difference(whole, small, x):
    "The largest difference in float64, relative to the largest output"
    for m in [*whole.modules(), *small.modules()]:
        if hasattr(m, 'attention_bias_cache'): m.attention_bias_cache.clear()  # timm's, of float32
    a, b = (tensors_in(m.double()(x.double())) for m in (whole, small))
    if [t.shape for t in a] != [t.shape for t in b]: return float('inf')
    return max(float((s - t).abs().max() / s.abs().max()) for s,t in zip(a, b))

def job(name, who, seed, limit, said):
    "One pruning in this process; every step is reported through the pipe `said`"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    model, x, last = made(name, seed)
    total = sum(p.numel() for p in model.parameters())
    said.send(dict(parameters=total))
    used  = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit) + 1, resource.RLIM_INFINITY))
    try: small, whole = CONTESTANTS[who](model, x, last)
    except Exception as e:
        return said.send(dict(result=failure(who, e), why=f'{type(e).__name__}: {e}'.split('\n')[0][:200]))
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,)*2)
    said.send(dict(seconds=round(time.process_time() - used, 1),
                   left=round(sum(p.numel() for p in small.parameters()) / total, 4)))
    try: apart = difference(whole, small, x)
    except Exception as e:
        return said.send(dict(result='does not run', why=f'{type(e).__name__}: {e}'.split('\n')[0][:200]))
    said.send(dict(result='exact' if apart < 1e-6 else 'another function', difference=f'{apart:.1e}'))

def failure(who, error):
    "Is it told what cannot be pruned, or does it fail?"
    return 'refused' if who == 'ours' and type(error) in (TypeError, ValueError) else 'crash'

def row(name, who, seed, limit):
    "What came out of a job"
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context('fork').Process(target=job, args=(name, who, seed, limit, there))
    process.start()
    there.close()
    found = dict(network=name, contestant=SHOWN[who], seed=seed, date=str(date.today()), result='crash', why='')
    try:
        while True: found |= here.recv()
    except EOFError: process.join()
    if process.exitcode == -signal.SIGXCPU: found |= dict(result='time limit', why=f'more than {limit} s of CPU')
    elif process.exitcode: found |= dict(result='crash', why=f'exit code {process.exitcode}')
    return found

def table(rows):
    "Results of each contestant, and who leaves less where both are exact"
    lines = [f'{"":18}' + ''.join(f'{r:>18}' for r in RESULTS)]
    for who in SHOWN.values():
        counts = Counter(r['result'] for r in rows if r['contestant'] == who)
        lines.append(f'{who:18}' + ''.join(f'{counts[r]:>18}' for r in RESULTS))
    return '\n'.join(lines)

RESULTS = ('exact', 'another function', 'does not run', 'refused', 'crash', 'time limit')

def read(file):
    "What a file says of its runs, and its rows"
    lines = file.read_text(encoding='utf-8').splitlines()
    about = dict(l[2:].split(': ', 1) for l in lines if l.startswith('# '))
    return about, [*csv.DictReader(l for l in lines if not l.startswith('# '))]

def others(file, names, contestants, about):
    "The rows of `file` that this run does not measure, and what the file says of their runs"
    before, rows = read(file)
    wrong = [k for k in COMMON if before.get(k) != str(about[k])]
    if wrong: raise SystemExit(f'{file} has other rows, measured with another {", ".join(wrong)}: pass another --out')
    kept = [r for r in rows if r['network'] not in names or r['contestant'] not in contestants]
    return kept, {k: v for k,v in before.items() if any(k == f'run {r["date"]}' for r in kept)}

def save(rows, about, file):
    rows = sorted(rows, key=lambda r: (NAMES.index(r['network']), int(r['seed'])))
    with open(file, 'w', newline='', encoding='utf-8') as f:
        f.writelines(f'# {k}: {v}\n' for k,v in about.items())
        writer = csv.DictWriter(f, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.networks', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='', help='names of networks, separated by commas (default: all). '
                                              'Rows of --out for other networks stay')
    p.add_argument('--seeds', type=int, default=3, help='how many random initialisations of each')
    p.add_argument('--contestants', default=','.join(CONTESTANTS), help='ours, theirs, or both')
    p.add_argument('--limit', type=int, default=60, help='seconds of CPU that pruning may take')
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/networks.csv'))
    args  = p.parse_args()
    names = args.only.split(',') if args.only else NAMES
    if unknown := set(names) - set(NAMES): p.error(f'--only takes {", ".join(NAMES)}; got {", ".join(sorted(unknown))}')
    found = machine('cpu') | {k: installed(k) for k in ('timm', 'torch-pruning')}
    about = {k: dict(found, sparsity=SPARSITY, limit=args.limit)[k] for k in COMMON}
    run   = {f'run {date.today()}': f'{found["cpu"]}; fasterai-clone {found["fasterai-clone"]}; seeds {args.seeds}'}
    shown = [SHOWN[who] for who in args.contestants.split(',')]
    rows, runs = others(args.out, names, shown, about) if args.only and args.out.exists() else ([], {})
    about = about | runs | run
    for name in names:
        for seed in range(args.seeds):
            for who in args.contestants.split(','):
                rows.append(r := row(name, who, seed, args.limit))
                shown = r['result'], r.get('left', ''), r.get('difference', ''), r.get('seconds', ''), r['why'][:90]
                print(f'{name:30} {seed} {r["contestant"]:15}', *[f'{v!s:<9}' for v in shown], flush=True)
                save(rows, about, args.out)
    print('\n' + table(rows))

if __name__ == '__main__': main()
