"""Losses: taken at the mean, as the user's loss is (what the variance costs is the penalty's part)."""

from __future__ import annotations

from torch import nn

from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Collapse, add_rule

_LOSSES: dict[str, tuple[type[nn.Module], ...]] = {
    "mse_loss": (nn.MSELoss,),
    "l1_loss": (nn.L1Loss,),
    "smooth_l1_loss": (nn.SmoothL1Loss,),
    "huber_loss": (nn.HuberLoss,),
    "binary_cross_entropy": (nn.BCELoss,),
    "binary_cross_entropy_with_logits": (nn.BCEWithLogitsLoss,),
    "cross_entropy": (nn.CrossEntropyLoss,),
    "nll_loss": (nn.NLLLoss,),
    "kl_div": (nn.KLDivLoss,),
    "gaussian_nll_loss": (nn.GaussianNLLLoss,),
    "poisson_nll_loss": (nn.PoissonNLLLoss,),
    "soft_margin_loss": (nn.SoftMarginLoss,),
    "cosine_embedding_loss": (nn.CosineEmbeddingLoss,),
    "hinge_embedding_loss": (nn.HingeEmbeddingLoss,),
    "margin_ranking_loss": (nn.MarginRankingLoss,),
    "multi_margin_loss": (nn.MultiMarginLoss,),
    "multilabel_margin_loss": (nn.MultiLabelMarginLoss,),
    "multilabel_soft_margin_loss": (nn.MultiLabelSoftMarginLoss,),
    "triplet_margin_loss": (nn.TripletMarginLoss,),
    "ctc_loss": (nn.CTCLoss,),
}
for _name, _modules in _LOSSES.items():
    add_rule(
        _name,
        Collapse(),
        Exactness.APPROXIMATE,
        "taken at the mean; the variance is left to the penalty",
        modules=_modules,
    )
