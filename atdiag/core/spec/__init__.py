"""The vocabulary: what a run *is*, as frozen models with a JSON form and a content hash.

The hash names the estimand: two runs with the same hash estimate the same quantity, so the second is never trained.
Everything that defines the quantity is hashed (weights by their sha256, the precision policy, both seeds); what only
says how or where it was computed (device, threads, cohort, paths, a teacher's alias) is not.

Equal conditions have equal specs. Each model brings itself to a canonical form when it is made: ``weight=0`` or no
layers mean ``method="none"``; a run that neither takes nor starts from a teacher has none. So the baseline is one and
the same run for every teacher of the same student.

Imports nothing of atdiag, and nothing heavy.
"""

from atdiag.core.spec.base import BelowOne as BelowOne
from atdiag.core.spec.base import NonNegative as NonNegative
from atdiag.core.spec.base import Positive as Positive
from atdiag.core.spec.base import Share as Share
from atdiag.core.spec.base import Spec as Spec
from atdiag.core.spec.data import Data as Data
from atdiag.core.spec.hashing import ADDED_FIELDS as ADDED_FIELDS
from atdiag.core.spec.hashing import NOT_HASHED as NOT_HASHED
from atdiag.core.spec.hashing import SEMANTICS as SEMANTICS
from atdiag.core.spec.hashing import content_hash as content_hash
from atdiag.core.spec.network import PLAIN_NORM_EPS as PLAIN_NORM_EPS
from atdiag.core.spec.network import Network as Network
from atdiag.core.spec.network import Teacher as Teacher
from atdiag.core.spec.recipe import Recipe as Recipe
from atdiag.core.spec.recipe import Seed as Seed
from atdiag.core.spec.run import RunSpec as RunSpec
from atdiag.core.spec.transfer import BlockModule as BlockModule
from atdiag.core.spec.transfer import Init as Init
from atdiag.core.spec.transfer import Transfer as Transfer
from atdiag.core.spec.transfer import TransferMethod as TransferMethod
