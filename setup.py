"Package metadata: everything is read from `settings.ini`, the version from `fasterai_clone/__init__.py`."
import configparser, re
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=['='], comment_prefixes=(';',))
parser.read(here/'settings.ini', encoding='utf-8')
cfg   = parser['DEFAULT']
lines = lambda key: [o.strip() for o in cfg.get(key, '').splitlines() if o.strip()]
name  = cfg['lib_name']

setup(
    name             = name,
    version          = re.search(r'__version__ = "(.+?)"', (here/name/'__init__.py').read_text(encoding='utf-8'))[1],
    description      = cfg['description'],
    long_description = (here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type = 'text/markdown',
    author           = cfg['author'],
    license          = cfg['license'],
    keywords         = cfg['keywords'].split(),
    python_requires  = f">={cfg['min_python']}",
    packages         = find_packages(include=[f'{name}*']),
    package_data     = {'': ['*.pyi'], name: ['py.typed', 'docs.json']},
    install_requires = lines('requirements'),
    extras_require   = dict(dev=lines('dev_requirements') + lines('docs_requirements'), docs=lines('docs_requirements'),
                            bench=lines('bench_requirements'), export=lines('export_requirements'),
                            hf=lines('hf_requirements'), lightning=lines('lightning_requirements'),
                            onnx=lines('onnx_requirements'), openvino=lines('openvino_requirements')),
    entry_points     = dict(console_scripts=lines('console_scripts'), nbdev=[f'{name} = {name}._modidx:d']),
    classifiers      = [f"Development Status :: {cfg['status']}", 'Intended Audience :: Developers',
                        'Intended Audience :: Science/Research',
                        'Programming Language :: Python :: 3',
                        'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
