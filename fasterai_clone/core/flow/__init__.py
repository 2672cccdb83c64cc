"What moved to `fasterai_clone.model`, under the name it had here"
from ...model.flops import Counted, multiply_adds
from ...model.flow import Flow, trace_flow
from ...model.preserve import copied, restored, undisturbed
from ...model.run import memory_of, outputs_in, tensors_in

__all__ = ['Flow', 'memory_of', 'tensors_in', 'outputs_in', 'restored', 'undisturbed', 'trace_flow', 'copied', 'Counted',
           'multiply_adds']
