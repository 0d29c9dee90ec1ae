from fusion import check_fused as check_fused
from fusion import check_refused as check_refused
from fusion import rng as rng
from fusion import without_conv as without_conv
from fusion import without_cost as without_cost
