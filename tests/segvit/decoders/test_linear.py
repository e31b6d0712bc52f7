from __future__ import annotations

import torch
import torch.nn.functional as F

from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.linear import LinearHead


def test_linear_head__concatenates_normalised_features_on_the_finest_grid() -> None:
    head = LinearHead((8, 16), num_classes=5)
    fine = FeatureMap(torch.randn(2, 24, 8), (4, 6), 4, (4, 6))
    coarse = FeatureMap(torch.randn(2, 6, 16), (2, 3), 8, (4, 6))
    output = head([fine, coarse])
    [(class_logits, logits)] = output.predictions
    assert class_logits is None
    assert output.stride == 4
    fine_map = F.layer_norm(fine.tokens, (8,)).transpose(1, 2).unflatten(2, (4, 6))  # type: ignore[no-untyped-call]
    coarse_map = F.layer_norm(coarse.tokens, (16,)).transpose(1, 2).unflatten(2, (2, 3))  # type: ignore[no-untyped-call]
    coarse_map = F.interpolate(coarse_map, size=(4, 6), mode="bilinear", align_corners=False)
    features = torch.cat((fine_map, coarse_map), dim=1)
    expected = torch.einsum("nc,bchw->bnhw", head.linear.weight, features)
    torch.testing.assert_close(logits, expected)
