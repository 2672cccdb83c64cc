"Everything to find coupled channels and take them out: `from fasterai_clone.prune.all import *`"
from .coupling import *
from .config import *
from .thin import *
from .thinned_files import *
from .report import *
from .vocabulary import *
from .prune_callback import *
from .distiller_callback import *
