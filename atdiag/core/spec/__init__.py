"""The vocabulary: what a run *is*, as frozen models with a JSON form and a content hash.

The hash names the estimand: two runs with the same hash estimate the same quantity, so the second is never trained.
Everything that defines the quantity is hashed (weights by their sha256, the precision policy, both seeds); how, where
and under which name it was computed (device, threads, cohort, paths, a teacher's alias) is not.

Equal conditions have equal specs. Each model converts itself to a canonical form on construction: ``weight=0`` or no
layers mean ``method="none"``; a run that uses no teacher, neither in training nor at initialisation, has none in its
spec. So the baseline is the same run for every teacher of the same student.

Imports nothing else of atdiag, and nothing heavy.
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
from atdiag.core.spec.masked import NOT_MASKED as NOT_MASKED
from atdiag.core.spec.masked import Masked as Masked
from atdiag.core.spec.network import OWN as OWN
from atdiag.core.spec.network import PLAIN_NORM_EPS as PLAIN_NORM_EPS
from atdiag.core.spec.network import Network as Network
from atdiag.core.spec.network import Teacher as Teacher
from atdiag.core.spec.recipe import Recipe as Recipe
from atdiag.core.spec.recipe import Seed as Seed
from atdiag.core.spec.run import PROBE_IMAGES as PROBE_IMAGES
from atdiag.core.spec.run import RunSpec as RunSpec
from atdiag.core.spec.sizes import BlockRule as BlockRule
from atdiag.core.spec.sizes import HeadRule as HeadRule
from atdiag.core.spec.specimen import Operation as Operation
from atdiag.core.spec.specimen import PlantedLosses as PlantedLosses
from atdiag.core.spec.transfer import BlockModule as BlockModule
from atdiag.core.spec.transfer import Init as Init
from atdiag.core.spec.transfer import Transfer as Transfer
from atdiag.core.spec.transfer import TransferMethod as TransferMethod
