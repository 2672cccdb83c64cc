"Everything to find coupled channels and take them out: `from fasterai_clone.prune.all import *`"
from ..model.channels.groups import *
from .coupling import *
from .config import *
from .thin import *
from .thinned_files import *
from ..analyze.cost import *
from ..analyze.compare import *
from .vocabulary import *
from .prune_callback import *
from .distiller_callback import *
