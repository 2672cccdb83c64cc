"""The documentation site: it builds without network, every name has its entry, every link leads somewhere, and a
browser shows every page as it should be"""
import importlib, inspect, json, os, re, shutil, subprocess, sys, threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from bs4 import BeautifulSoup
from fastcore.docments import docments

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import build_docs
import navigation
from build_docs import WRITTEN, BrokenLink, link_locally, problems, site_pages
from navigation import FOLDERS, GROUPS, INTERNALS

blob  = 'https://github.com/fasterai-clone/fasterai_clone/blob/main/'
docs  = [p.doc for p in site_pages()] + WRITTEN
pages = pytest.mark.parametrize('doc', docs)


# Building, with the network cut off

no_network = '''
"No connection but to this machine"
import socket
def guarded(real):
    def connect(self, address):
        if self.family != getattr(socket, 'AF_UNIX', None) and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise OSError(f'the network is cut off: {address}')
        return real(self, address)
    return connect
socket.socket.connect, socket.socket.connect_ex = guarded(socket.socket.connect), guarded(socket.socket.connect_ex)
def getaddrinfo(host, *args, real=socket.getaddrinfo, **kwargs):
    if host not in (None, '127.0.0.1', '::1', 'localhost'): raise OSError(f'the network is cut off: {host}')
    return real(host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
'''

@cache
def own_net():
    "What gives a process a network of its own, with nothing on it, where the system lets us"
    command = ['unshare', '--map-root-user', '--net']
    if not shutil.which('unshare'): return ()
    return tuple(command) if subprocess.run([*command, 'true'], capture_output=True).returncode == 0 else ()

@pytest.fixture(scope='module')
def cut_off(tmp_path_factory):
    "Runs Python without network"
    guard = tmp_path_factory.mktemp('guard')
    (guard/'sitecustomize.py').write_text(no_network)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(guard), str(root)]), 'PYTHONDONTWRITEBYTECODE': '1'}
    return lambda *args: subprocess.run([*own_net(), sys.executable, *map(str, args)], env=env, capture_output=True,
                                        text=True, timeout=900)

@pytest.fixture(scope='module')
def site(cut_off, tmp_path_factory):
    "The site, built once"
    dest = tmp_path_factory.mktemp('site')/'_site'
    done = cut_off(root/'tools'/'build_docs.py', '--dest', dest)
    assert done.returncode == 0, done.stderr[-4000:]
    assert 'WARNING' not in done.stderr
    return dest

@pytest.fixture(scope='module', autouse=True)
def no_pages_left():
    "Forget the parsed pages: millions of objects, which would slow down every test after these"
    yield
    soup.cache_clear()

@cache
def soup(path): return BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')

def test_the_network_is_cut_off(cut_off):
    "For names and for addresses, and also where only Python is cut off"
    code = '''if True:
        import socket
        for address in (('pypi.org', 443), ('1.1.1.1', 53)):
            try: socket.create_connection(address, timeout=5)
            except OSError as e: print(e)
            else: raise SystemExit('connected')'''
    done = cut_off('-c', code)
    assert done.returncode == 0 and done.stdout.count('cut off') == 2, done
    if own_net():
        done = subprocess.run([*own_net(), sys.executable, '-c', code], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done

def test_every_notebook_has_its_page(site):
    "... and a form for other tools, and nothing is there that was not built"
    found = {p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts}
    assert found == {f'{d}.html' for d in docs} | {'search.html'}
    assert len(site_pages()) == len([p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts])
    for p in site_pages(): assert (site/f'{p.doc}.html.md').read_text(encoding='utf-8').startswith('# ')

def test_no_link_leads_nowhere(site): assert list(problems(site)) == []

def sidebar(site):
    "Group → addresses of the pages that its list shows, and of those one level below"
    tree = soup(site/'index.html').select_one('.sidebar-tree')
    def links(ul): return [a['href'].removesuffix('.html') for a in ul.select('a')]
    return {c.text.strip(): links(c.find_next_sibling('ul')) for c in tree.select('.caption')}

def test_the_sidebar_is_sorted_by_what_people_want(site):
    "Every page once; what a newcomer needs first, and single modules of the code last"
    groups = sidebar(site)
    assert list(groups) == ['Start', 'Guides', 'Choosing', 'Studies', 'Reference', 'Internals']
    links = [l for g in groups.values() for l in g]
    assert sorted(links) == sorted(set(docs) - {'index'})
    assert groups['Start'][0] == 'tutorials/quickstart'
    tutorials = {p.doc for p in site_pages() if p.is_tutorial}
    assert tutorials <= {l for g in ('Start', 'Guides', 'Choosing', 'Studies') for l in groups[g]}
    for name in ('criteria', 'contexts_and_collapse', 'schedules'): assert f'tutorials/{name}' in groups['Choosing']
    assert groups['Reference'][:3] == ['api', 'sparse.sparsify_callback', 'sparse.sparsifier']
    assert 'core.style' in groups['Internals'] and 'contributing' in groups['Internals']

def test_named_pages_are_in_the_order_of_their_names_in_the_sidebar(site):
    for group,links in sidebar(site).items():
        shown = [l.removeprefix('tutorials/') for l in links]
        named = [n for n in GROUPS.get(group, ()) if n in shown]
        assert [l for l in shown if l in named] == named
        assert group == INTERNALS or set(GROUPS[group]) <= set(shown), 'a page that is named does not exist'

def test_modules_with_public_names_are_in_the_reference(site):
    assert navigation.public_modules() <= set(sidebar(site)['Reference'])
    assert {'sparse.sparsifier', 'core.masks', 'model.channels.groups'} <= navigation.public_modules()

def test_internals_are_listed_in_the_order_of_their_numbers(site):
    for folder in FOLDERS:
        listed = [l['href'].removesuffix('.html')
                  for l in soup(site/f'internals-{folder}.html').select('article li > p > a:first-child')]
        want   = [p.doc for p in site_pages() if p.group == INTERNALS and p.doc.split('.')[0] == folder]
        assert listed == want, folder

def title(site, doc): return soup(site/f'{doc}.html').select_one('article h1').find(string=True).strip()

def test_titles_of_pages_are_unique(site):
    titles = [title(site, d) for d in docs]
    assert {t for t in titles if titles.count(t) > 1} == set()

def test_the_first_page_argues(site):
    "Claim, measured table, three benefits, one snippet, and links by task"
    page = soup(site/'index.html').select_one('article')
    assert page.select_one('h1 + blockquote')
    order = ['table' if e.name == 'table' else 'code' if e.name == 'pre' else 'card'
             for e in page.select('table, .card, pre')]
    assert re.fullmatch('(table )+(card ){3}code (card ){6}', ' '.join(order) + ' ')
    assert 'SparsifyCallback' in page.select_one('pre').text
    readme = re.sub(r'\]\([^)]*\)', ']', (root/'README.md').read_text(encoding='utf-8'))  # without addresses
    for cell in page.select('table td'): assert re.sub(r'\W', '', cell.text) in re.sub(r'\W', '', readme), cell.text

@pytest.mark.parametrize('page', [p for p in site_pages() if p.is_tutorial], ids=lambda p: p.doc)
def test_a_tutorial_opens_in_colab(site, page):
    "From the repository that settings.ini names, which the page says how to install"
    repository = re.search(r'^repository = https://github.com/(\S+)$',
                           (root/'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    about = soup(site/f'{page.doc}.html').select_one('p.about')
    want  = f'https://colab.research.google.com/github/{repository}/blob/main/nbs/tutorials/{page.path.name}'
    assert about.select_one('a')['href'] == want
    assert f'!pip install git+https://github.com/{repository}' in about.text

def test_pages_of_the_reference_have_no_badge(site):
    for p in site_pages():
        if not p.is_tutorial: assert 'colab' not in (site/f'{p.doc}.html').read_text(encoding='utf-8').lower(), p.doc

def test_the_workflow_builds_it_with_the_same_command():
    text = (root/'.github'/'workflows'/'docs.yml').read_text(encoding='utf-8')
    for what in ('run: python tools/build_docs.py\n', 'tools/refresh.py --check && git diff --exit-code',
                 'upload-pages-artifact', '{path: _site}', 'deploy-pages'):
        assert what in text


# Reference

@cache
def public():
    "(module, name, value) of each public name"
    found = []
    for path in sorted((root/'fasterai_clone').rglob('*.py')):
        if 'AUTOGENERATED' not in path.read_text(encoding='utf-8')[:1000]: continue
        m = importlib.import_module('.'.join(path.relative_to(root).with_suffix('').parts))
        found += [(m, n, getattr(m, n)) for n in m.__all__]
    return found

def methods(cls):
    "Public methods and properties with a docstring that are written here"
    for n,v in vars(cls).items():
        f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v.fget if isinstance(v, property) else v
        ours = getattr(f, '__module__', '').startswith('fasterai_clone') and getattr(f, '__doc__', None)
        if ours and inspect.isfunction(f) and f.__name__ == n and not re.match('_|before_|after_', n): yield n, f

@pytest.fixture(scope='module')
def signatures(site):
    "Full name → the element with its signature"
    return {dt['id']: dt for d in docs for dt in soup(site/f'{d}.html').select('dt.sig[id]')}

def names():
    for m,n,v in public():
        home = sys.modules.get(getattr(v, '__module__', None), m)
        if home is not m and n in getattr(home, '__all__', ()): continue  # its entry is in the room it comes from
        yield f'{m.__name__}.{n}', v
        if inspect.isclass(v): yield from ((f'{f.__module__}.{n}.{k}', f) for k,f in methods(v))

def test_every_public_name_has_an_entry(signatures):
    assert len(list(names())) > 200
    assert [n for n,_ in names() if n not in signatures] == []

def test_signatures_are_those_of_the_code(signatures):
    for name,v in names():
        # decorated: the code says another
        if not inspect.isfunction(v) or name.split('.')[-1] in ('hold', 'sparsity_report', 'sparsify_demo'): continue
        given = [e.text.split('=')[0].lstrip('*') for e in signatures[name].select('.sig-param')]
        wants = [p for p in inspect.signature(v).parameters]
        shown = signatures[name].select('.sig-paren')
        if shown: assert [g for g in given if g] == wants[wants[:1] in (['self'], ['cls']):], name

def test_every_entry_leads_to_its_source(signatures):
    for name,_ in names():
        link = signatures[name].select_one(f'a[href^="{blob}"]')['href']
        path, first, last = re.fullmatch(rf'{blob}(.+)#L(\d+)-L(\d+)', link).groups()
        lines = (root/path).read_text(encoding='utf-8').splitlines()[int(first)-1:int(last)]
        own   = name.split('.')[-1]
        assert re.search(rf'(def|class) {own}\b|^.*\b{own}\b.* = ', '\n'.join(lines)), (name, link)

def test_comments_on_arguments_are_in_the_tables(signatures):
    "Against fastcore's own reading of them"
    def plain(s): return re.sub(r'[\W_]+', '', s)
    seen = 0
    for name,v in names():
        inherited = inspect.isclass(v) and '__init__' not in vars(v)
        if not (inspect.isfunction(v) or inspect.isclass(v)) or inherited or not (notes := docments(v)): continue
        text = plain(signatures[name].find_next_sibling('dd').text)
        for arg,note in notes.items():
            if not note or arg == 'self': continue
            seen += 1
            assert plain(note.splitlines()[-1]) in text, (name, arg, note)
    assert seen > 300

def test_the_index_of_names_is_complete_and_in_order(site):
    terms = soup(site/'api.html').select('#all-names dt')
    shown = [t.text.strip() for t in terms]
    assert shown == sorted(shown, key=str.lower) and {n for _,n,_ in public()} <= set(shown)
    for t in terms:
        assert t.select_one('a[href*="#fasterai_clone."]'), t
        assert t.find_next_sibling('dd').text.strip() or '.' in t.text, f'{t.text} has no line on what it is'

@pages
def test_names_in_the_text_lead_to_their_entries(site, doc):
    known = {n for _,n,_ in public()}
    page  = soup(site/f'{doc}.html')
    own   = {id(c) for c in page.select('dl.py td:first-child code')}  # names of arguments are nobody else's
    bare  = [c for c in page.select('article p code, article li code, article td code')
             if c.text in known and not c.find_parent('a') and id(c) not in own]
    assert [c.text for c in bare] == []
    assert not any(c.find_parent('a') for c in page.select('dl.py td:first-child code'))

def test_names_in_code_lead_to_their_entries(site):
    links = {a.text: a['href']
             for a in soup(site/'tutorials'/'coming_from_torch_prune.html').select('article pre a.in-code')}
    assert links['Sparsifier'] == '../sparse.sparsifier.html#fasterai_clone.sparse.sparsifier.Sparsifier'

def test_addresses_that_modules_give_exist(site):
    from fasterai_clone._modidx import d
    for m in {m.__name__: m for m,_,_ in public()}.values():
        url = re.search(r'^Docs: (\S+)$', m.__doc__ or '', re.M)[1]
        assert (site/url.removeprefix(build_docs.pages).strip('/')).is_file(), url
    shown = {m.__name__: m.__all__ for m,_,_ in public()}
    for module,syms in d['syms'].items():
        for full,(url,_) in syms.items():
            if full.removeprefix(f'{module}.') not in shown.get(module, ()): continue
            page, anchor = url.split('#')
            assert soup(site/page).find(id=anchor), url

def test_the_readme_links_to_pages_that_exist(site):
    text  = (root/'README.md').read_text(encoding='utf-8')
    links = re.findall(rf'\({build_docs.pages}/?([^)#]*)[^)]*\)', text)
    assert links and all((site/(l or 'index.html')).is_file() for l in links)

@pages
def test_pictures_have_words(site, doc):
    assert [i for i in soup(site/f'{doc}.html').select('article img') if len(i.get('alt', '')) < 10] == []


# What is refused

def of(name): return next(p for p in site_pages() if p.path.name == name)

@pytest.mark.parametrize('link', ['nope.ipynb', '../nope.ipynb', 'images/nope.png', 'nope.md',
                                  f'{build_docs.github}/nbs/nope.ipynb', f'{build_docs.pages}/nope.html'])
def test_a_link_to_nothing_is_refused(link):
    with pytest.raises(BrokenLink, match='nope'):
        link_locally(f'See [this]({link}).', of('060_core.masks.ipynb'), set())

@pytest.mark.parametrize('link, want', [
    ('700_prune.coupling.ipynb', 'prune.coupling.ipynb'), ('040_core.selection.ipynb#pieces-of-tensors',
                                                           'core.selection.ipynb#pieces-of-tensors'),
    ('tutorials/lottery_tickets.ipynb', 'tutorials/lottery_tickets.ipynb'),
    (f'{build_docs.github}/CHANGELOG.md', 'changelog.md'),
    (f'{build_docs.pages}/core.masks.html#masks', 'core.masks.ipynb#masks'),
    ('https://arxiv.org/abs/1803.03635', 'https://arxiv.org/abs/1803.03635'),
    ('../tools/refresh.py', f'{build_docs.github}/tools/refresh.py')])
def test_links_become_those_to_pages(link, want):
    assert link_locally(f'[x]({link}) and `[y]({link})`', of('060_core.masks.ipynb'),
                        set()) == f'[x]({want}) and `[y]({link})`'

def test_links_of_tutorials_go_up():
    assert link_locally('[x](../700_prune.coupling.ipynb)', of('lottery_tickets.ipynb'),
                        set()) == '[x](../prune.coupling.ipynb)'

def test_what_is_wrong_with_a_site_is_found(tmp_path):
    (tmp_path/'good.html').write_text('<p id="here">x</p><a href="good.html#here">x</a><img '
                                      'src="data:image/png;base64,">')
    assert list(problems(tmp_path)) == []
    (tmp_path/'bad.html').write_text('''<p id="a"></p><p id="a"></p>
        <a href="gone.html">x</a><a href="good.html#there">x</a><a href="#b">x</a>
        <img src="gone.png"><script src="https://cdn.example/x.js"></script>
        <link href="//fonts.example/x.css" rel="stylesheet"><a href="https://ok.example">x</a>''')
    (tmp_path/'x.css').write_text('@font-face { src: url("https://fonts.example/x.woff") }')
    found = ' '.join(problems(tmp_path))
    for what in ('the id a', 'gone.html', 'good.html#there', 'no #b', 'gone.png', 'cdn.example', 'fonts.example/x.css',
                 'x.woff'): assert what in found
    assert len(list(problems(tmp_path))) == 8

def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path/'mine.txt').write_text('x')
    with pytest.raises(SystemExit, match='not empty'): build_docs.build(tmp_path)
    assert (tmp_path/'mine.txt').exists()


# In a browser

flags = '''--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
    --disable-sync --disable-quic --no-first-run'''.split()

@pytest.fixture(scope='module')
def address(site):
    "Where the site is served"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    "Headless Chromium"
    binary = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if not (binary and driver):
        say = pytest.fail if os.environ.get('NEED_BROWSER') else pytest.skip
        say('there is no Chromium to look at the pages with: `apt-get install chromium chromium-driver`')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for f in [*flags, f'--user-data-dir={tmp_path_factory.mktemp("chromium")}']: options.add_argument(f)
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    chrome.set_script_timeout(20)
    yield chrome
    chrome.quit()

def size(browser, width):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                            dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 500))

def show(browser, url):
    "Load `url` and wait until formulas are set"
    browser.get(url)
    browser.execute_async_script('const done = arguments[0]; (window.MathJax?.startup?.promise ?? '
                                 'Promise.resolve()).then(() => done())')

# Contrast of what is written with what is behind it, as WCAG computes it, for every element with text of its own that
# can be seen
faint = '''
    document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>')
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    const rgba = c => {
        canvas.clearRect(0, 0, 1, 1)
        canvas.fillStyle = c
        canvas.fillRect(0, 0, 1, 1)
        return [...canvas.getImageData(0, 0, 1, 1).data]
    }
    const light = c => {
        const [r, g, b] = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 })
        return 0.2126*r + 0.7152*g + 0.0722*b
    }
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = rgba(getComputedStyle(e).backgroundColor)
            if (c[3] > 250) return c
        }
        return [255, 255, 255, 255]
    }
    const found = []
    for (const e of document.querySelectorAll('article *, .sidebar-tree *, .toc-tree *')) {
        if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || !e.getClientRects().length) continue
        if (e.matches('.headerlink, mjx-container *, option')) continue
        const a = light(rgba(getComputedStyle(e).color)), b = light(behind(e))
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
        const text = e.textContent.trim().slice(0, 40)
        if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className} ${text}`)
    }
    return found'''

# What does not fit: code and output without a way to see the rest, pictures, and the page itself
cut_off_blocks = '''
    document.querySelectorAll('details').forEach(d => { d.open = true })
    const article = document.querySelector('article, [role=main]')
    const right = article.getBoundingClientRect().right + 1
    const out = e => e.scrollWidth > e.clientWidth + 1
    const found = []
    for (const p of article.querySelectorAll('pre'))
        if (out(p) || p.getBoundingClientRect().right > right) found.push('code: ' + p.textContent.slice(0, 60))
    for (const t of article.querySelectorAll('.wide, .table-wrapper, .output.text_html')) {
        const scrolls = getComputedStyle(t).overflowX == 'auto' && innerWidth < 500
        const over = t.getBoundingClientRect().right > right
        if (out(t) && !scrolls || over) found.push('table: ' + t.textContent.slice(0, 60))
    }
    for (const i of article.querySelectorAll('img'))
        if (i.getBoundingClientRect().right > right) found.push('picture: ' + i.alt)
    if (document.documentElement.scrollWidth > innerWidth) found.push('the page scrolls sideways')
    return found'''

@pytest.mark.parametrize('doc', [*docs, 'search'])
def test_a_page_in_the_browser(browser, address, doc):
    """No errors, nothing from elsewhere, every picture there; nothing is cut off on a phone or on a desk; legible in
    both themes"""
    size(browser, 390)
    for kind in ('browser', 'performance'): browser.get_log(kind)
    show(browser, f'{address}/{doc}.html')
    errors = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    assert errors == []
    sent = [m['params']['request']['url'] for e in browser.get_log('performance')
            if (m := json.loads(e['message'])['message'])['method'] == 'Network.requestWillBeSent']
    assert any(u.startswith(address) for u in sent)
    assert [u for u in sent if not u.startswith((address, 'data:', 'blob:'))] == []
    assert browser.execute_script('return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)') == []
    for theme in ('light', 'dark'):
        browser.execute_script('document.body.dataset.theme = arguments[0]', theme)
        assert browser.execute_script(faint) == [], theme
    for width in (390, 1400):
        size(browser, width)
        assert browser.execute_script(cut_off_blocks) == [], width

@pytest.mark.parametrize('doc', ['index', 'tutorials/quickstart', 'sparse.sparsifier', 'analyze.compare'])
@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1400])
def test_nothing_is_cut_off_in_either_theme(browser, address, doc, theme, width):
    size(browser, width)
    show(browser, f'{address}/{doc}.html')
    browser.execute_script('document.body.dataset.theme = arguments[0]', theme)
    assert browser.execute_script(cut_off_blocks) == []

def test_what_is_cut_off_is_found(browser, address):
    size(browser, 390)
    show(browser, f'{address}/tutorials/quickstart.html')
    browser.execute_script("""document.head.insertAdjacentHTML('beforeend',
        '<style>.highlight pre { white-space: pre !important } img { max-width: 50rem !important }</style>')""")
    found = browser.execute_script(cut_off_blocks)
    assert any(f.startswith('code') for f in found) and any(f.startswith('picture') for f in found)

def test_88_columns_of_code_fit_on_a_line(browser, address):
    "On a desk; a longer line goes on below, and copying still gives one line"
    size(browser, 1400)
    show(browser, f'{address}/core.granularity.html')
    lines = browser.execute_script('''
        document.querySelectorAll('details').forEach(d => { d.open = true })
        return [...document.querySelectorAll('.cell_input pre .line')].map(l => [l.textContent,
            l.getBoundingClientRect().height, parseFloat(getComputedStyle(l).lineHeight)])''')
    assert all(height < 1.5*line for text,height,line in lines if len(text.rstrip()) <= 88)
    long = [text for text,height,line in lines if height > 1.5*line]
    assert long and all(t.count('\n') == 1 for t in long)
    code = json.loads((root/'nbs'/'010_core.granularity.ipynb').read_text(encoding='utf-8'))['cells']
    assert any(long[0] in ''.join(c['source']) + '\n' for c in code)

def test_search_finds_the_page(browser, address):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    size(browser, 1400)
    show(browser, f'{address}/index.html')
    browser.find_element(By.CSS_SELECTOR, 'input.sidebar-search').send_keys('SparsifyCallback', Keys.ENTER)
    results = WebDriverWait(browser, 15).until(lambda b: b.find_elements(By.CSS_SELECTOR, 'ul.search li a'))
    found = [urlsplit(a.get_attribute('href')).path for a in results]
    assert found[0] == '/sparse.sparsify_callback.html', found[:5]

def test_the_button_changes_the_theme(browser, address):
    from selenium.webdriver.common.by import By
    size(browser, 1400)
    show(browser, f'{address}/index.html')
    colours = {}
    for _ in range(3):
        next(b for b in browser.find_elements(By.CSS_SELECTOR, 'button.theme-toggle') if b.is_displayed()).click()
        theme = browser.execute_script('return document.body.dataset.theme')
        colours[theme] = browser.execute_script('return [getComputedStyle(document.body).backgroundColor, '
                                                'getComputedStyle(document.querySelector("article p")).color]')
    assert set(colours) == {'auto', 'light', 'dark'}
    for i in (0, 1): assert colours['light'][i] != colours['dark'][i]
    browser.refresh()
    assert browser.execute_script('return document.body.dataset.theme') == theme, 'the choice is remembered'
