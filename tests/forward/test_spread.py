"""A model on several devices: each layer's slots lie where the layer does, batches go there."""

import copy

import pytest
import torch
import transformers as tf

from guided_decode import load_scorer
from guided_decode.cache.pool import SlotPool
from guided_decode.checkpoints.how_loaded import HowLoaded
from guided_decode.checkpoints.source import open_source
from guided_decode.forward import attention
from guided_decode.forward.pool_size import default_capacity
from tests import models
from tests.checkpoints.quantised_models import needs
from tests.oracle import Values

accelerate = needs("accelerate")
META, CPU = torch.device("meta"), torch.device("cpu")


def rows_and_candidates(steps=5):
    ids = models.prompts([40], seed=5)[0]
    for step in range(steps):
        rows = [ids[: 9 + step], [*ids[:5], *ids[20 : 22 + step]], ids[:3]]
        yield rows, torch.tensor([[50 + step, 51, 52], [60, 61 + step, -1], [70, 71, 72]])


def assert_brute_force(scorer, model):
    values = Values(model)
    for rows, candidates in rows_and_candidates():
        got = scorer.score(rows, candidates)
        for i, row in enumerate(rows):
            real = [token for token in candidates[i].tolist() if token >= 0]
            wanted = torch.tensor(values.after(row, real))
            torch.testing.assert_close(got.values[i, : len(real)].cpu(), wanted, rtol=0, atol=1e-4)
            assert got.baseline[i].item() == pytest.approx(values([row])[0], abs=1e-4)


def test_a_layers_slots_lie_where_the_layer_does():
    shapes = [(2, 12, 12), (2, 12, 12)]
    pool = SlotPool(10, shapes, torch.float32, CPU, [CPU, META])
    assert [keys.device for keys in pool.keys] == [CPU, META]
    assert [values.device for values in pool.layer_values] == [CPU, META]
    assert pool.values.device == CPU
    assert pool.is_spread
    again = pool.like(4)
    assert [keys.device for keys in again.keys] == [CPU, META]
    assert not SlotPool(10, shapes, torch.float32, CPU).is_spread


def test_a_pool_has_room_on_every_device():
    """The device with most of the layers decides how many tokens there are."""
    model, shapes = models.tiny("llama", "token").model, [(2, 1 << 16, 1 << 16)] * 4
    even = default_capacity(shapes, model, 0, [CPU, CPU, META, META])
    uneven = default_capacity(shapes, model, 0, [CPU, META, META, META])
    one = default_capacity(shapes, model, 0)
    assert even == pytest.approx(one * 2, abs=2)
    assert uneven == pytest.approx(one * 4 / 3, abs=2)


@pytest.fixture
def copied(monkeypatch):
    """The second layer's attention reads and writes by a copy of the batch, made once a forward."""
    made = []

    def layer_one(batch):
        if CPU not in batch.copies:
            batch.copies[CPU] = batch.copied(CPU)
            made.append(batch)
        return batch.copies[CPU]

    def update(self, key, value, layer, *args, **kwargs):
        batch = layer_one(self._batch) if layer == 1 else self._batch
        batch.pool.keys[layer].index_copy_(0, batch.slots, key[0].transpose(0, 1))
        batch.pool.layer_values[layer].index_copy_(0, batch.slots, value[0].transpose(0, 1))
        return key, value

    packed_attention = attention.packed_attention

    def attend(module, *args, packed=None, **kwargs):
        batch = layer_one(packed) if module.layer_idx == 1 else packed
        return packed_attention(module, *args, packed=batch, **kwargs)

    monkeypatch.setattr(attention.SlotCache, "update", update)
    tf.AttentionInterface.register(attention.ATTENTION_NAME, attend)
    yield made
    tf.AttentionInterface.register(attention.ATTENTION_NAME, packed_attention)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding"])
def test_a_layer_that_goes_by_a_copy_of_the_batch_gives_the_same(arch, fused, copied):
    """What another device gets of a batch: its own few rows of the slot table, renumbered."""
    model = models.tiny(arch, "token")
    scorer = load_scorer(model, "verl-critic")
    scorer.model.fused = fused
    before = scorer.stats.forwards
    assert_brute_force(scorer, model)
    # Once a forward, of the self-check's too, for both parts of the layer.
    assert len(copied) >= scorer.stats.forwards - before > 0
    batch = copied[-1]
    assert len(batch.copies[CPU].table) == len(batch.segments) <= len(batch.table)
    assert batch.on(CPU) is batch


def test_weights_are_read_straight_to_their_device_where_accelerate_is_there(monkeypatch):
    """A checkpoint larger than the host's memory still loads to its GPU."""
    from guided_decode.checkpoints import placement

    gpu = torch.device("cuda", 1)
    for there in (True, False):
        monkeypatch.setattr(placement, "has_accelerate", lambda there=there: there)
        straight = {"": gpu} if there else None
        assert placement.for_loading(None, gpu, always=False) == straight
        assert placement.for_loading(None, None, always=False) is None
        # Else transformers would pick a GPU for what is quantised.
        assert placement.for_loading(None, None, always=True) == {"": CPU}


@accelerate
def test_the_device_of_a_load_reaches_transformers(monkeypatch):
    """A device other than the CPU, here one that holds no numbers, is where weights are read to."""
    from guided_decode.checkpoints import trunk
    from guided_decode.checkpoints.source import open_source

    seen = {}

    def record(source, auto_class, given):
        seen.update(given)
        raise LookupError

    monkeypatch.setattr(trunk, "from_pretrained", record)
    with pytest.raises(LookupError):
        trunk.load_trunk(open_source(models.saved("llama", "token")), None, META)
    assert seen["device_map"] == {"": META}


@accelerate
@pytest.mark.parametrize("given", ["auto", {"": "cpu"}, {"model": "cpu", "score": "cpu"}])
def test_a_device_map_that_is_one_device(given):
    scorer = load_scorer(models.saved("llama", "token"), "verl-critic", device_map=given)
    assert not scorer.cache.pool.is_spread
    assert_brute_force(scorer, models.tiny("llama", "token"))


@accelerate
@pytest.mark.parametrize(
    "given",
    [
        {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "norm": 1, "rotary_emb": 0},
        {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
         "model.rotary_emb": 0, "score": 1},
    ],
)  # fmt: skip
def test_maps_by_the_names_of_the_trunk_or_of_the_whole_class(given):
    from guided_decode.checkpoints.placement import for_loading, of_trunk

    trunk = of_trunk(given, "model.")
    assert trunk == {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "norm": 1, "rotary_emb": 0}
    assert for_loading(trunk, None, always=False) == trunk
    whole = for_loading(trunk, None, always=False, prefix="model.", others=("score",))
    assert whole == {f"model.{name}": place for name, place in trunk.items()} | {"score": 0}


@pytest.mark.parametrize(
    "given",
    [
        {"embed_tokens": 0, "layers": 1, "norm": 1},
        {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "lm_head": 1},
    ],
)
def test_maps_of_a_language_model_have_either_names(given):
    """One of an implicit pair is loaded whole."""
    source = open_source(models.saved("llama", "lm"))
    how = HowLoaded(device_map={name: torch.device("cuda", at) for name, at in given.items()})
    options = how.options(source, None, None, tf.AutoModelForCausalLM, trunk=False)
    placed = {name: place.index for name, place in options["device_map"].items()}
    assert placed.pop("score", 1) == 1
    assert placed == {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "lm_head": 1}
    whole = HowLoaded(device_map={"model": CPU, "lm_head": META})
    options = whole.options(source, None, None, tf.AutoModelForCausalLM, trunk=False)
    assert {name: options["device_map"][name] for name in ("model", "lm_head")} == whole.device_map


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("cuda:0", {}, r"device_map='cuda:0': expected one of auto, balanced, .*for one device pa"),
        ({}, {}, "expected one of auto"),
        ({"": "gpu"}, {}, "device_map sends the model to 'gpu': device='gpu' names no device"),
        ({"model.layers.0": "meta", "": "cpu"}, {}, "sends model.layers.0 to 'meta', which holds"),
        ({"": "cpu", "model.layerz.1": "cpu"}, {}, "device_map names model.layerz.1, which .* does "
         "not have: expected its modules, model.layers.0 say"),
        ("auto", {"device": "cpu"}, "device='cpu' and device_map='auto' were both given"),
    ],
)  # fmt: skip
@accelerate
def test_maps_that_are_refused(given, more, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(models.saved("llama", "token"), "verl-critic", device_map=given, **more)


@accelerate
def test_a_model_in_memory_has_its_places():
    with pytest.raises(ValueError, match=r"device_map='auto' was given for .*, a model in memory"):
        load_scorer(models.tiny("llama", "token"), "verl-critic", device_map="auto")


@accelerate
def test_a_model_in_memory_whose_weights_wait_elsewhere_is_refused():
    from accelerate import cpu_offload

    waits = cpu_offload(copy.deepcopy(models.tiny("llama", "token")), CPU)
    with pytest.raises(ValueError, match="without all of its weights .* on the meta device, and w"):
        load_scorer(waits, "verl-critic")


def test_weights_that_wait_elsewhere_are_refused():
    from guided_decode.checkpoints.placement import refuse_offloaded

    model = copy.copy(models.tiny("llama", "token"))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu", "score": "disk"}
    with pytest.raises(ValueError, match=r"layers.1, score would wait on the CPU or a disk"):
        refuse_offloaded(model, "critic")


@accelerate
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("first", [0, 1])
def test_on_two_gpus(arch, first):
    second = 1 - first
    places = {"embed_tokens": first, "rotary_emb": first, "layers.0": first, "layers.1": second,
              "norm": second}  # fmt: skip
    scorer = load_scorer(models.saved(arch, "token"), "verl-critic", device_map=places)
    pool = scorer.cache.pool
    assert [keys.device.index for keys in pool.keys] == [first, second]
    assert scorer.graphs is None
    assert_brute_force(scorer, models.tiny(arch, "token"))
    pair = load_scorer(
        models.saved(arch, "lm"), "implicit", reference=models.saved(arch, "lm", seed=1),
        device_map="balanced",
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    tuned, base = (models.tiny(arch, "lm", seed)(ids).logits.log_softmax(-1) for seed in (0, 1))
    got = pair.score([[5, 6, 7]], torch.tensor([[3, 4, 90]])).values[0].cpu()
    torch.testing.assert_close(got, (tuned - base)[0, -1, [3, 4, 90]], rtol=0, atol=1e-4)
