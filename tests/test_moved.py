"Modules of version 0.1.0 can be imported under their old names"
import importlib, subprocess, sys, warnings

import pytest
from fasterai_clone.moved import MOVED

PUBLIC = {k: v.split() for k,v in {  # the public names that each of them had
    'report': 'Row Report shared_weights as_mask_of used_weights weights_in report_tensors print_text',
    'core.budget': 'limits check_limits erk_counts lamp bounded affordable row_mask',
    'core.flow': 'Flow memory_of tensors_in outputs_in restored undisturbed trace_flow copied Counted multiply_adds',
    'core.measure': 'wanda snip grasp synflow apoz mean_activation bn_scale untouched Labels as_batch batches '
                    'arguments accumulated snip_scores grasp_scores synflow_scores passes_signal input_norms '
                    'channel_zeros channel_means norm_scales available_criterias as_criteria',
    'prune.report': 'LayerCost Cost Comparison compare',
    'sparse.state': 'optimizer_state set_optimizer_state random_state set_random_state read_state _ENTRY'}.items()}


@pytest.mark.parametrize('name', MOVED)
def test_old_names_are_found_with_a_warning(name):
    sys.modules.pop(f'fasterai_clone.{name}', None)
    says = f'`fasterai_clone.{name}` has moved: import its names from `fasterai_clone'
    with pytest.warns(DeprecationWarning, match=says) as seen:
        module = importlib.import_module(f'fasterai_clone.{name}')
    assert len(seen) == 1
    missing = [k for k in PUBLIC[name] if not hasattr(module, k)]
    assert not missing

def test_the_names_are_the_same_objects():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from fasterai_clone.report import Report
        from fasterai_clone.prune.report import compare
    from fasterai_clone.analyze import compare as new
    from fasterai_clone.sparse import report
    assert Report is report.Report and compare is new.compare

def test_the_warning_is_at_the_line_that_imports():
    run = subprocess.run([sys.executable, '-W', 'always::DeprecationWarning:__main__', '-c',
                          'import fasterai_clone.core.budget'], capture_output=True, text=True)
    assert not run.returncode and '<string>:1: DeprecationWarning: `fasterai_clone.core.budget`' in run.stderr

def test_other_modules_are_as_missing_as_before():
    with pytest.raises(ModuleNotFoundError): importlib.import_module('fasterai_clone.reports')
    with pytest.raises(ModuleNotFoundError): importlib.import_module('fasterai_clone.core.report')
