"What moved to `fasterai_clone.model`, under the names it had here"
from ...model.flops import *
from ...model.flow import *
from ...model.preserve import *
from ...model.run import *
