"""Every mobile module against the unmodified module of diffusers or transformers, on the same weights, in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from export.checkpoint import Checkpoint, open_checkpoint
from export.components.activation import use_spelled_gelu
from export.components.attention import use_fused_attention
from export.components.component import Component
from export.components.mmdit import TransformerConfig
from export.components.text_encoder import TextEncoder, TextEncoderConfig
from export.components.transformer import AdaptiveNorm, RmsNorm, chunk_ranges
from export.components.vae_decoder import VaeConfig
from export.errors import UserError
from export.families import read_family
from export.families.family import Family, GraphOptions
from export.families.sd3 import Sd3
from export.formats.onnx_kernels import use_kernels
from export.rewrites import Rewrites, rewrites_of
from tests.models import SD3, SD35, Reference, TinyModel, load_reference, random_ids, write_checkpoint

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
FLASH = GraphOptions(width=128, height=128, sigmas=SIGMAS)
SHAPES = [(128, 128), (192, 96), (64, 160)]


@dataclasses.dataclass(frozen=True)
class Tiny:
    model: TinyModel
    checkpoint: Checkpoint
    family: Family
    reference: Reference


@pytest.fixture(scope="module", params=[SD35, SD3], ids=["sd3.5", "sd3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    checkpoint = open_checkpoint(str(folder))
    return Tiny(request.param, checkpoint, read_family(checkpoint), load_reference(folder))


def component(family: Family, name: str, options: GraphOptions = FLASH) -> Component:
    return next(part for part in family.components(options) if part.name == name)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Maximal error below `tolerance` of the largest wanted value."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def assert_contract(component: Component, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Runs the module; inputs and outputs must be those that the component declares."""
    assert [tuple(value.shape) for value in inputs] == [spec.shape for spec in component.inputs]
    outputs = module(*inputs)
    assert [tuple(value.shape) for value in outputs] == [spec.shape for spec in component.outputs]
    assert all(str(value.dtype).endswith(spec.dtype) for value, spec in zip(outputs, component.outputs, strict=True))
    return outputs


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoder_gives_last_but_one_states_and_projected_end_of_text(tiny: Tiny, name: str, fused: bool) -> None:
    part = component(tiny.family, name)
    module = use_fused_attention(part.load(tiny.checkpoint), fused)
    for seed in range(4):
        ids = random_ids(tiny.model, seed)
        wanted = getattr(tiny.reference, name)(ids.long(), output_hidden_states=True)
        states, pooled = assert_contract(part, module, (ids,))
        assert_close(states, wanted.hidden_states[-2])
        assert_close(pooled, wanted.text_embeds)


def test_text_encoder_of_contract_diffusers_gives_all_states(tiny: Tiny) -> None:
    options = dataclasses.replace(FLASH, contract="diffusers", rewrites=rewrites_of("diffusers"))
    part = component(tiny.family, "text_encoder_2", options)
    ids = random_ids(tiny.model, 7).long()
    wanted = tiny.reference.text_encoder_2(ids, output_hidden_states=True)
    outputs = assert_contract(part, part.load(tiny.checkpoint), (ids,))
    expected = (wanted.text_embeds, wanted.last_hidden_state, *wanted.hidden_states)
    assert [spec.name for spec in part.outputs] == [
        "text_embeds",
        "last_hidden_state",
        *(f"hidden_states.{i}" for i in range(4)),
    ]
    for found, value in zip(outputs, expected, strict=True):
        assert_close(found, value)


def test_finite_causal_mask_equals_minus_infinity_even_in_half_precision(tiny: Tiny) -> None:
    part = component(tiny.family, "text_encoder")
    module = part.load(tiny.checkpoint)
    assert isinstance(module, TextEncoder)
    ids = random_ids(tiny.model, 3)
    for dtype in (torch.float32, torch.float16):
        module.to(dtype)
        finite = module(ids)
        mask = module.causal_mask
        module.causal_mask = torch.full_like(mask, -torch.inf).triu(1)
        for found, wanted in zip(finite, module(ids), strict=True):
            assert torch.equal(found, wanted)
        module.causal_mask = mask


@pytest.mark.parametrize("eos_token_id", [2, 90])
def test_pooling_takes_the_first_of_repeated_end_of_text_tokens(eos_token_id: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 91, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 8}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 10}
    original = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **depth, eos_token_id=eos_token_id)).eval()
    module = TextEncoder(TextEncoderConfig(**sizes, **depth, eos_token_id=eos_token_id), 10)
    module.load_state_dict(original.state_dict())
    with torch.no_grad():
        for length in range(9):
            ids = torch.tensor([[89, *range(length), *[90] * (9 - length)]], dtype=torch.int32)
            assert_close(module(ids)[1], original(ids.long()).text_embeds)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused and spelled"])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_whole_transformer_equals_diffusers(tiny: Tiny, width: int, height: int, fused: bool) -> None:
    options = GraphOptions(width, height, SIGMAS, "diffusers", rewrites_of("diffusers"))
    part = component(tiny.family, "transformer", options)
    module = use_spelled_gelu(use_fused_attention(part.load(tiny.checkpoint), fused), spelled=fused)
    torch.manual_seed(1)
    latent, prompt, pooled, _ = (torch.randn(spec.shape) for spec in part.inputs)
    for timestep in (1000.0, 602.25, 8.9):
        inputs = (latent, prompt, pooled, torch.tensor([timestep]))
        (found,) = assert_contract(part, module, inputs)
        assert_close(found, tiny.reference.transformer(*inputs).sample)
    assert [spec.name for spec in part.inputs] == ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert [spec.name for spec in part.outputs] == ["out_hidden_states"]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_whole_transformer_in_onnx_runtime_s_forms_equals_diffusers(tiny: Tiny, width: int, height: int) -> None:
    part = component(tiny.family, "transformer", GraphOptions(width, height, SIGMAS, "diffusers", rewrites_of("diffusers")))
    module = use_kernels(part.load(tiny.checkpoint))
    assert not any(isinstance(child, (AdaptiveNorm, RmsNorm)) for child in module.modules())
    torch.manual_seed(1)
    latent, prompt, pooled, _ = (torch.randn(spec.shape) for spec in part.inputs)
    inputs = (latent, prompt, pooled, torch.tensor([602.25]))
    (found,) = assert_contract(part, module, inputs)
    assert_close(found, tiny.reference.transformer(*inputs).sample)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae_decoder"])
def test_components_in_onnx_runtime_s_forms_equal_themselves(tiny: Tiny, name: str) -> None:
    """The transformer's attention has the bias of the folded null tokens here, a text encoder's a mask."""
    part = component(tiny.family, name)
    torch.manual_seed(3)
    inputs = tuple(random_ids(tiny.model, 3) if s.dtype.startswith("int") else torch.randn(s.shape) for s in part.inputs)
    found = use_kernels(part.load(tiny.checkpoint))(*inputs)
    for value, wanted in zip(found, part.load(tiny.checkpoint)(*inputs), strict=True):
        assert_close(value, wanted)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_vae_decoder_gives_the_pipeline_s_image(tiny: Tiny, width: int, height: int, fused: bool) -> None:
    part = component(tiny.family, "vae_decoder", dataclasses.replace(FLASH, width=width, height=height))
    module = use_fused_attention(part.load(tiny.checkpoint), fused)
    torch.manual_seed(2)
    latent = torch.randn(part.inputs[0].shape)
    vae = tiny.reference.vae
    sample = vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
    (image,) = assert_contract(part, module, (latent,))
    assert image.shape == (1, 3, height, width)
    assert_close(image, (sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_compose_to_the_whole_transformer(tiny: Tiny, chunks: int) -> None:
    whole, *parts = [
        [part for part in tiny.family.components(dataclasses.replace(FLASH, chunks=n)) if part.name.startswith("transformer")]
        for n in (1, chunks)
    ]
    torch.manual_seed(3)
    latent, context, modulation = (torch.randn(spec.shape) for spec in whole[0].inputs)
    (wanted,) = whole[0].load(tiny.checkpoint)(latent, context, modulation)
    states: tuple[Tensor, ...] = (latent, context)
    used = 0
    for part in parts[0]:
        rows = part.inputs[2].shape[1]
        states = assert_contract(part, part.load(tiny.checkpoint), (*states, modulation[:, used : used + rows]))
        used += rows
    assert used == modulation.shape[1]
    assert torch.equal(states[0], wanted)
    names = [part.name for part in parts[0]]
    assert names == (["transformer"] if chunks == 1 else [f"transformer_chunk{i}of{chunks}" for i in range(1, chunks + 1)])


def test_no_graph_names_an_output_as_an_input(tiny: Tiny) -> None:
    diffusers = dataclasses.replace(FLASH, contract="diffusers", rewrites=rewrites_of("diffusers"))
    for options in (FLASH, dataclasses.replace(FLASH, chunks=3), diffusers):
        for part in tiny.family.components(options):
            names = [spec.name for spec in (*part.inputs, *part.outputs)]
            assert len(set(names)) == len(names), part.name


# What coremltools, ONNX and ExecuTorch all lower; `alias`, easily let in by a slice of everything, is not among them.
OPERATIONS = (
    *("add", "mul", "sub", "rsub", "clamp", "exp", "sin", "cos", "sigmoid", "silu", "gelu", "rsqrt", "mean", "amax", "eq"),
    *("linear", "matmul", "conv2d", "embedding", "softmax", "layer_norm", "group_norm", "upsample_nearest2d"),
    *("cat", "clone", "pad", "permute", "select", "slice", "squeeze", "transpose", "unsqueeze", "view", "_unsafe_view"),
    *("_to_copy", "_assert_tensor_metadata"),
)


def test_graphs_hold_only_operations_that_every_backend_lowers(tmp_path: Path) -> None:
    """Chunks of one block and a grid as large as the table, where slices take everything."""
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, TinyModel(layers=2, dual_layers=(0,), table_size=4))))
    family = read_family(checkpoint)
    chunked = GraphOptions(64, 64, SIGMAS, chunks=2)
    whole = GraphOptions(64, 64, SIGMAS, rewrites=Rewrites(False, False, False, False))
    for part in (*family.components(chunked), component(family, "transformer", whole)):
        inputs = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in part.inputs)
        graph = torch.export.export(part.load(checkpoint), inputs).run_decompositions({}).graph
        used = {str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"}
        assert used <= set(OPERATIONS), f"{part.name}: {sorted(used - set(OPERATIONS))}"


def test_blank_module_lacks_nothing_but_weights(tiny: Tiny) -> None:
    for part in tiny.family.components(FLASH):
        blank, loaded = part.blank(), part.load(tiny.checkpoint)
        assert all(weight.is_meta for weight in blank.state_dict().values())
        assert {name: value.shape for name, value in blank.state_dict().items()} == {
            name: value.shape for name, value in loaded.state_dict().items()
        }
        constants = dict(blank.named_buffers())
        for name, value in loaded.named_buffers():
            assert name in blank.state_dict() or torch.equal(constants[name], value)
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
        assert all(weight.dtype == torch.float32 for weight in loaded.parameters())


def test_half_precision_sharded_checkpoint_loads_the_same_values(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SD35, dtype=torch.float16, shard_size="100KB")
    checkpoint, reference = open_checkpoint(str(folder)), load_reference(folder)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    weights = component(read_family(checkpoint), "transformer").load(checkpoint).state_dict()
    original = reference.transformer.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in weights.items() if name != "pos_embed.pos_embed")


# stabilityai/stable-diffusion-3.5-medium, as its configuration files say.
MEDIUM = Sd3(
    transformer=TransformerConfig(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    text_encoder=TextEncoderConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12, eos_token_id=2
    ),
    text_encoder_2=TextEncoderConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        eos_token_id=2,
    ),
    vae=VaeConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_post_quant_conv=False,
    ),
    tokens=77,
)


def original_tensors() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of SD3.5-Medium's tensors by folder, from the original classes."""
    transformer = {field.name: getattr(MEDIUM.transformer, field.name) for field in dataclasses.fields(MEDIUM.transformer)}
    autoencoder: dict[str, object] = {
        "use_quant_conv": False,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    for field in dataclasses.fields(MEDIUM.vae):
        autoencoder.setdefault(field.name, getattr(MEDIUM.vae, field.name))
    with torch.device("meta"):
        modules = {
            "transformer": SD3Transformer2DModel(**transformer),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**dataclasses.asdict(MEDIUM.text_encoder))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**dataclasses.asdict(MEDIUM.text_encoder_2))),
            "vae": AutoencoderKL(**autoencoder),
        }
    return {
        folder: {name: tuple(value.shape) for name, value in module.state_dict().items()} for folder, module in modules.items()
    }


def test_components_of_sd35_medium_read_every_tensor_of_the_original() -> None:
    options = GraphOptions(width=512, height=512, sigmas=SIGMAS)
    originals = original_tensors()
    read: dict[str, dict[str, tuple[int, ...]]] = {folder: {} for folder in originals}
    ignored: dict[str, tuple[str, ...]] = dict.fromkeys(originals, ())
    for part in MEDIUM.components(options):
        read[part.folder].update(part.reads())
        ignored[part.folder] += part.ignored
    for folder, tensors in originals.items():
        assert read[folder] == {name: shape for name, shape in tensors.items() if not name.startswith(ignored[folder])}
    counts = {folder: sum(torch.Size(shape).numel() for shape in tensors.values()) for folder, tensors in originals.items()}
    assert counts["transformer"] == 2_243_171_520 + 226_492_416
    assert counts["text_encoder"] == 123_650_304
    assert counts["text_encoder_2"] == 694_659_840
    decoder = component(MEDIUM, "vae_decoder", options).reads()
    assert sum(torch.Size(shape).numel() for shape in decoder.values()) == 49_545_475


def test_conditioner_of_sd35_medium_takes_a_third_of_the_weights_along() -> None:
    parts = {part.name: part for part in MEDIUM.components(GraphOptions(512, 512, SIGMAS))}
    weights = {name: sum(value.numel() for value in part.blank().parameters()) for name, part in parts.items()}
    modulation = sum(value.numel() for name, value in parts["conditioner"].blank().named_parameters() if "norm" in name)
    assert round(modulation / 1e6) == 767
    assert weights["transformer"] < 2_243_171_520 - modulation
    assert parts["transformer"].blank().state_dict()["pos_embed.pos_embed"].shape == (1, 1024, 1536)


def test_chunks_of_sd35_medium_weigh_about_the_same() -> None:
    options = GraphOptions(512, 512, SIGMAS, chunks=3)
    parts = [part for part in MEDIUM.components(options) if part.name.startswith("transformer")]
    weights = [sum(value.numel() for value in part.blank().parameters()) for part in parts]
    assert max(weights) < 1.1 * sum(weights) / 3
    ranges = chunk_ranges(MEDIUM.transformer, 24)
    assert ranges == [(i, i + 1) for i in range(24)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 500}, "--resolution 500x128: both must be multiples of 16; try 496x128"),
        ({"height": 0}, "--resolution 128x0: both must be multiples of 16; try 128x16"),
        ({"width": 400}, "--resolution 400x128: this model's positional table holds at most 384 pixels each way"),
        ({"chunks": 4}, "--chunks 4: this transformer has 3 blocks; choose 1 to 3"),
        ({"contract": "diffusers"}, "--contract diffusers keeps diffusers' inputs and outputs"),
        (
            {"contract": "diffusers", "rewrites": rewrites_of("diffusers"), "chunks": 2},
            "--chunks 2: only a transformer without",
        ),
    ],
)
def test_options_a_model_cannot_take_are_refused_in_one_line(tiny: Tiny, change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.family.components(dataclasses.replace(FLASH, **change))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_default_resolution_is_the_transformer_s_sample_size(tiny: Tiny) -> None:
    assert tiny.family.default_resolution == (128, 128)
    assert tiny.family.latent_shape(dataclasses.replace(FLASH, width=192, height=96)) == (1, 4, 12, 24)
