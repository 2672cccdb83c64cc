"""The sidebar: pages by what a reader wants, not by where the code is.

A tutorial that is not named here comes after the guides; a module with public names, or in no folder, after the
reference; any other module into its folder of the internals."""
import ast
from functools import cache
from pathlib import Path

root    = Path(__file__).resolve().parent.parent
package = root/'fasterai_clone'

# Names of tutorials, or of the pages of other notebooks, in reading order
GROUPS = {
    'Start': 'quickstart plain_pytorch coming_from_torch_prune coming_from_fasterai cli sparsify',
    'Guides': '''prune_a_vision_learner warm_up_then_prune half_the_filters_to_onnx bert_2_4_with_trainer
        your_own_criterion_and_schedule structured_pruning filters_and_channels prune_a_trained_network
        train_towards_zeros prune_quantize_export transformers trainers resume_and_distributed glossary''',
    'Choosing': 'everything_you_can_choose granularity criteria contexts_and_collapse schedules',
    'Studies': 'lottery_tickets what_makes_a_network_faster what_pays_where benchmarks guarantees',
    'Reference': '''sparse.sparsify_callback sparse.sparsifier sparse.report core.masks core.granularity core.criteria
        sparse.measure core.schedule sparse.context sparse.rule sparse.keep sparse.keep_callback sparse.save_callback
        sparse.compact sparse.tickets_callback sparse.ticket_files sparse.plots prune.prune_callback prune.thin
        prune.coupling model.channels.groups prune.thinned_files prune.vocabulary prune.config
        prune.distiller_callback analyze.cost analyze.compare methods.recalibrate methods.reconstruct methods.sparsegpt
        methods.fit methods.regrow methods.group_lasso methods.lasso_callback methods.proximal
        methods.proximal_callback methods.admm methods.admm_callback methods.distill methods.distill_callback
        export.sparse_files export.sparse_layers export.onnx export.openvino export.learner_callback
        trainers.huggingface trainers.lightning demo digits'''}
GROUPS    = {k: v.split() for k,v in GROUPS.items()}
INTERNALS = 'Internals'
TUTORIALS = [t for g in ('Start', 'Guides', 'Choosing', 'Studies') for t in GROUPS[g]]

# The folders of the code: what the page that lists one is called, and what it says
FOLDERS = dict(
    core=('Foundations', 'Arguments, scores, selection, masks and files: what needs no model'),
    model=('Models', 'Layers, runs, traces and channels of one model, which stays as it was'),
    fit=('Training runs', 'What all callbacks share: progress, checkpoints, resuming, rewinding'),
    sparse=('Sparsity', 'Find, score, choose, apply, keep and report: the parts of a `Sparsifier`'),
    methods=('Methods', 'Adjust the remaining weights without training, or train towards zeros'),
    trainers=('Trainers', 'The schedule by optimizer steps, for training loops other than fastai\'s'),
    prune=('Removal', 'Take channels out of a model, its optimizer and its files'),
    analyze=('Measurements', 'Count and time what a model costs'),
    export=('Compression and export', 'Small files, sparse layers, ONNX and OpenVINO'))

def listing(folder): return f'internals-{folder}'

@cache
def public_modules():
    "Modules that a file `all.py` imports from, except for those of tensors and models alone"
    found = []
    for path in sorted(package.rglob('all.py')):
        folder = path.parent.relative_to(package).parts
        if folder in ((), ('core',), ('model',)): continue
        for n in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(n, ast.ImportFrom):
                found.append('.'.join([*folder[:len(folder) - n.level + 1], n.module]))
    return set(found)

def place(name, module=''):
    "The group of a notebook's page, and its place in it: `name` is that of a tutorial, or of the page"
    for group,names in GROUPS.items():
        if name in names: return group, names.index(name)
    folder = module.split('.')[0]
    if module and (module in public_modules() or folder not in FOLDERS): return 'Reference', len(GROUPS['Reference'])
    if module: return INTERNALS, list(FOLDERS).index(folder)
    return 'Guides', len(GROUPS['Guides'])
