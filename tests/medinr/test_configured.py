"""Parts are written into a checkpoint as plain values and come back the same."""

import io
import json
from pathlib import Path

import pytest
import torch

from medinr.configured import Configured, build, spec
from medinr.errors import UserError
from medinr.fields import SIREN, DisplacementMap, HarmonizedSIREN
from medinr.losses import MSE, NCC, Barrier, Bending, Diffusion, Hyperelastic, Jacobian, LocalNCC, SymmetricJacobian
from medinr.methods import PairRegistration

PARTS = {
    "siren": lambda: SIREN(hidden=(8, 4), omega=5.0, zero_output=False),
    "harmonized siren": lambda: HarmonizedSIREN(2, hidden=[8, 8], shared=True),
    "map of a field": lambda: DisplacementMap(SIREN(hidden=(8,))),
    "local ncc": lambda: LocalNCC(3.0, per_side=2),
    "ncc": NCC,
    "mse": MSE,
    "bending": lambda: Bending(0.5, directions="probes"),
    "jacobian": lambda: Jacobian(0.1, 0.5),
    "symmetric jacobian": lambda: SymmetricJacobian(0.1, published=True),
    "diffusion": lambda: Diffusion(weight=2.0),
    "hyperelastic": lambda: Hyperelastic(0.1, area=0.0),
    "barrier": lambda: Barrier(10.0, eps=0.2),
    "method": lambda: PairRegistration(
        SIREN(hidden=(8,)),
        LocalNCC(),
        {"bending": Bending(1.0), "barrier": Barrier(2.0)},
        pyramid_mm=(4.0, 0.0),
        window=(0.0, 1.0),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_round_trip(name: str) -> None:
    """Through JSON and through a weights-only checkpoint; the same class, arguments and parameters' shapes."""
    part = PARTS[name]()
    values = spec(part)
    again = build(json.loads(json.dumps(values)))
    assert type(again) is type(part)
    assert spec(again) == json.loads(json.dumps(values))
    buffer = io.BytesIO()
    torch.save(values, buffer)
    buffer.seek(0)
    assert spec(build(torch.load(buffer, weights_only=True))) == json.loads(json.dumps(values))
    again.load_state_dict(part.state_dict())


def test_a_rebuilt_field_computes_the_same() -> None:
    field = HarmonizedSIREN(hidden=(8, 8), omega=3.0, zero_output=False)
    again = build(spec(field))
    again.load_state_dict(field.state_dict())
    x, alpha = torch.rand(6, 3), torch.tensor([0.4])
    assert torch.equal(again(x, alpha), field(x, alpha))


def test_arguments_of_a_method_survive() -> None:
    again = build(spec(PARTS["method"]()))
    assert isinstance(again, PairRegistration)
    assert {k: (type(r), r.weight) for k, r in again.penalties.items()} == {
        "bending": (Bending, 1.0),
        "barrier": (Barrier, 2.0),
    }
    assert tuple(again.pyramid_mm) == (4.0, 0.0)


class Part(Configured):
    def __init__(self, value: object, other: int = 3) -> None:
        self.value, self.other = value, other


def test_only_what_was_given_is_written_and_paths_are_text() -> None:
    assert spec(Part(Path("a") / "b"))["init_args"] == {"value": "a/b"}
    assert spec(Part({"x": (1, None)}, other=4))["init_args"] == {"value": {"x": [1, None]}, "other": 4}


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Part\.value: expected a plain value .* got Tensor"):
        spec(Part(torch.zeros(2)))
    with pytest.raises(TypeError, match=r"value\.inner: .* got object"):
        spec(Part({"inner": object()}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.Field", "cannot be imported"),
        ("medinr.fields.NoSuchField", "cannot be imported"),
        ("NoModule", "cannot be imported"),
        ("os.system", "is not a class that medinr builds"),
        ("pathlib.Path", "is not a class that medinr builds"),
    ],
)
def test_a_checkpoint_builds_only_our_classes(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({"class_path": path, "init_args": {}})
