"Everything to find coupled channels and take the zero ones out: `from fasterai_clone.prune.all import *`"
from .coupling import *
from .thin import *
from .report import *
