"""What is refused at start-up, and the parts of the engine seam that need no engine."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from crane_serve.common.masks import InlineMasksOff, MaskError, MaskFileError, MaskLibrary
from crane_serve.engine import plugin
from crane_serve.engine.activations import ActivationRequest, ActivationsOff, Reduction, admit_activations
from crane_serve.engine.admission import admit, requested_mask
from crane_serve.engine.asked_activations import AskedActivations
from crane_serve.engine.config import MaskConfig, mask_config
from crane_serve.engine.support import UnsupportedEngine, caution, check_engine, check_version
from tests.engines import random_masks
from tests.tiny import tiny_model

SEEING = [(False, False), (True, False), (False, True)]  # activations, gates


def plain_config(**changes: object) -> SimpleNamespace:
    """The fields of a VllmConfig that are looked at, for an engine in which everything is supported."""
    fields = {
        "parallel_config": SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        "model_config": SimpleNamespace(enable_sleep_mode=False),
        "scheduler_config": SimpleNamespace(max_num_seqs=8),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "weight_transfer_config": None,
        "use_v2_model_runner": False,
        "additional_config": {},
    }
    for path, value in changes.items():
        holder, _, attribute = path.partition("__")
        if attribute:
            setattr(fields[holder], attribute, value)
        else:
            fields[holder] = value
    return SimpleNamespace(**fields)


def test_a_plain_engine_is_supported() -> None:
    check_engine(plain_config())


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"parallel_config__use_ubatching": True}, "microbatching"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"weight_transfer_config": object()}, "weights that change"),
        ({"model_config__enable_sleep_mode": True}, "enable-sleep-mode"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(changes: dict[str, object], feature: str) -> None:
    with pytest.raises(UnsupportedEngine, match=feature):
        check_engine(plain_config(**changes))


@pytest.mark.parametrize(
    ("variable", "feature"),
    [
        ("VLLM_USE_RUST_FRONTEND", "Rust front end"),
        ("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "request ids that may be used twice"),
    ],
)
def test_what_the_environment_asks_for_is_refused_by_name(
    variable: str, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UnsupportedEngine, match=feature):
        check_engine(plain_config())


def test_the_fields_that_are_checked_exist_in_vllm() -> None:
    """A renamed field would make a check pass for ever."""
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig

    fields = {"use_ubatching", "prefill_context_parallel_size"}
    assert fields <= set(dir(ParallelConfig()))
    assert "kv_sharing_fast_prefill" in dir(CacheConfig())
    assert "enable_sleep_mode" in ModelConfig.__dataclass_fields__
    fields = {
        "speculative_config",
        "lora_config",
        "kv_transfer_config",
        "weight_transfer_config",
        "use_v2_model_runner",
        "additional_config",
    }
    assert fields <= set(dir(VllmConfig)) | set(VllmConfig.__dataclass_fields__)


def test_only_tested_versions_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version("0.32.0")
    check_version("0.32.0+cpu")
    with pytest.raises(UnsupportedEngine, match=r"vLLM 0\.34\.0 has not been tested.*CRANE_ALLOW_UNTESTED_VLLM=1"):
        check_version("0.34.0")
    monkeypatch.setenv("CRANE_ALLOW_UNTESTED_VLLM", "1")
    check_version("0.34.0")


def test_a_version_that_was_only_read_is_accepted_with_a_warning() -> None:
    check_version("0.33.0")
    assert "no build of this version has been run with masks" in str(caution("0.33.0+cu130"))
    assert caution("0.32.0") is None
    assert caution("0.34.0") is None  # which only CRANE_ALLOW_UNTESTED_VLLM=1 accepts


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> tuple[MaskConfig, MaskLibrary]:
    directory = tmp_path_factory.mktemp("configured")
    model = tiny_model("llama", directory / "model")
    library = random_masks(model, directory / "masks", share=0.1)
    return MaskConfig(9, False, False, str(model), directory / "masks", "attnlrp", library.manifest), library


def test_the_configuration_survives_the_way_to_other_processes(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    config, _ = configured
    for arrived in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):  # noqa: S301
        assert arrived == config
        assert (arrived.masks, arrived.manifest, arrived.rows) == (config.masks, config.manifest, 9)
        assert arrived.allows_inline is arrived.library().allows_inline is False
    allowing = MaskConfig(*config.fields[:8], allows_inline=True)
    assert allowing == config  # masks in requests need no other graph
    assert pickle.loads(pickle.dumps(allowing)).library().allows_inline  # noqa: S301


def test_only_what_changes_the_graph_is_in_the_compile_cache_key(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    config, _ = configured
    elsewhere = MaskConfig(9, False, False, "other", Path("other"), "lape", "0" * 64)
    assert elsewhere == config
    assert MaskConfig(10, False, False, "other", Path("other"), "lape", "0" * 64) != config
    assert MaskConfig(9, True, False, "other", Path("other"), "lape", "0" * 64) != config
    assert MaskConfig(9, False, True, "other", Path("other"), "lape", "0" * 64) != config
    seeing = [MaskConfig(*config.fields[:8], activations=each, gates=gates) for each, gates in SEEING]
    assert [(each.activations, each.gates) for each in seeing] == [(False, False), (True, False), (True, True)]
    assert seeing[0] == config
    assert seeing[1] not in (seeing[0], seeing[2])
    assert pickle.loads(pickle.dumps(seeing[2])) == seeing[2] != config  # noqa: S301


def test_the_compile_cache_key_of_vllm_differs_with_and_without_masks(
    configured: tuple[MaskConfig, MaskLibrary],
) -> None:
    from vllm.config import VllmConfig

    config, _ = configured
    masked = VllmConfig(additional_config={"crane": config})
    assert masked.compute_hash() != VllmConfig().compute_hash()
    assert mask_config(masked) is masked.additional_config["crane"]
    assert mask_config(masked).manifest == config.manifest


def test_a_foreign_entry_under_our_key_is_refused() -> None:
    with pytest.raises(TypeError, match="reserved"):
        mask_config(plain_config(additional_config={"crane": {"rows": 3}}))


def test_masks_that_changed_since_the_start_are_refused(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    config, _ = configured
    stale = MaskConfig(config.rows, False, False, config.model, config.masks, config.default_method, "0" * 64)
    with pytest.raises(MaskFileError, match="changed while the engine was starting"):
        stale.library()


def parameters(**extra_args: object) -> SimpleNamespace:
    return SimpleNamespace(extra_args=dict(extra_args) or None)


def test_admission_sends_digests_on_and_leaves_the_callers_arguments_alone(
    configured: tuple[MaskConfig, MaskLibrary],
) -> None:
    config, library = configured
    engine = plain_config(additional_config={"crane": config})
    asked = parameters(crane_mask="zh", other=1)
    original = asked.extra_args
    resolved = admit(engine, asked, resumable=False)
    assert resolved is not None
    assert asked.extra_args == {"crane_mask": library.get("zh").mask.digest, "crane_positions": "all", "other": 1}
    assert original == {"crane_mask": "zh", "other": 1}
    unmasked = parameters(crane_mask="none", other=1)
    assert admit(engine, unmasked, resumable=False) is None
    assert unmasked.extra_args == {"other": 1}
    assert admit(engine, None, resumable=False) is None


@pytest.mark.parametrize(("asked", "message"), [("fr", "unknown mask"), (3, "is int, expected a mask name")])
def test_admission_refuses(configured: tuple[MaskConfig, MaskLibrary], asked: object, message: str) -> None:
    engine = plain_config(additional_config={"crane": configured[0]})
    with pytest.raises(MaskError, match=message):
        admit(engine, parameters(crane_mask=asked), resumable=False)


def test_admission_sends_positions_on_in_canonical_form(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    model = SimpleNamespace(get_vocab_size=lambda: 258)
    engine = plain_config(additional_config={"crane": configured[0]}, model_config=model)
    asked = parameters(crane_mask="zh", crane_positions="prompt[0:] generated[0:9] until=257,3")
    resolved = admit(engine, asked, resumable=False)
    assert resolved is not None
    assert asked.extra_args["crane_positions"] == "prompt+generated[:9]+until=3,257" == str(resolved.positions)


def test_an_end_that_no_token_can_be_is_refused(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    model = SimpleNamespace(get_vocab_size=lambda: 258)
    engine = plain_config(additional_config={"crane": configured[0]}, model_config=model)
    asked = parameters(crane_mask="zh", crane_positions="all+until=7,258")
    with pytest.raises(MaskError, match=r"until=7,258: token 258 is not in .* vocabulary of 258 tokens \(0 to 257\)"):
        admit(engine, asked, resumable=False)
    asked = parameters(crane_mask="zh", crane_positions="all+until=7")
    with pytest.raises(MaskError, match="until=7: the prompt has embeddings, of which no token id is known"):
        admit(engine, asked, resumable=False, embeds=True)


@pytest.fixture
def allowing(configured: tuple[MaskConfig, MaskLibrary]) -> SimpleNamespace:
    """An engine that takes masks in requests."""
    return plain_config(additional_config={"crane": MaskConfig(*configured[0].fields[:8], allows_inline=True)})


def test_admission_sends_the_mask_of_a_request_on_in_one_form(allowing: SimpleNamespace) -> None:
    for neurons in ({"2": [7, 3], "0": [1]}, {0: [1], 2: [3, 7]}):
        asked = parameters(crane_mask={"neurons": neurons}, crane_positions="prompt", other=1)
        resolved = admit(allowing, asked, resumable=False)
        assert resolved is not None
        assert (resolved.name, resolved.mask.neurons) == ("inline", 3)
        sent = {"crane_mask": 'neurons:{"neurons":{"0":[1],"2":[3,7]},"scale":0.0}', "crane_positions": "prompt"}
        assert asked.extra_args == {**sent, "other": 1}
        assert admit(allowing, asked, resumable=False) == resolved  # in the engine core
        assert asked.extra_args == {**sent, "other": 1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"neurons": {"0": [160]}}, "layer 0: 160 is no neuron, expected whole numbers from 0 to 159"),
        ({"neurons": {"3": [0]}}, "layer '3' is none of the model's"),
        ({"neurons": {"0": [1], 0: [2]}}, "'0' is given twice"),
        ({"neurons": {"0": {1, 2}}}, "cannot be written as JSON"),
        ({"neurons": {"0": [1]}, "scale": float("nan")}, "'scale' is nan"),
        ({"neurons": {"0": [1]}, "offset": 0.5}, "adds to neurons, which this engine was started without"),
        ("neurons:{}", "'neurons' holds something else"),
        ("zh,neurons:{}", "no name can join"),
        (["neurons"], "is list, expected a mask name, or an object"),
    ],
)
def test_admission_refuses_a_mask_that_the_engine_cannot_run(
    allowing: SimpleNamespace, asked: object, message: str
) -> None:
    with pytest.raises(MaskError, match=message):
        admit(allowing, parameters(crane_mask=asked), resumable=False)


def test_an_engine_that_does_not_allow_it_refuses_the_mask_of_a_request(
    configured: tuple[MaskConfig, MaskLibrary],
) -> None:
    engine = plain_config(additional_config={"crane": configured[0]})
    for asked in ({"neurons": {"0": [1]}}, 'neurons:{"neurons":{"0":[1]},"scale":0.0}'):
        with pytest.raises(InlineMasksOff, match="CRANE_INLINE_MASKS=1"):
            admit(engine, parameters(crane_mask=asked), resumable=False)


@pytest.mark.parametrize("variable", ["CRANE_INLINE_MASKS", "CRANE_ACTIVATIONS", "CRANE_GATES"])
@pytest.mark.parametrize("value", ["false", "2", "yes", " 1"])
def test_a_switch_that_says_neither_yes_nor_no_is_refused(
    configured: tuple[MaskConfig, MaskLibrary], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    from crane_serve.engine.config import add_mask_config

    monkeypatch.setenv("CRANE_MASKS", str(configured[0].masks))
    monkeypatch.setenv(variable, value)
    engine = SimpleNamespace(model_config=SimpleNamespace(model=configured[0].model), additional_config={})
    with pytest.raises(ValueError, match=f"{variable} is .*, expected 0 or 1"):
        add_mask_config(engine)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({}, "activations; CRANE_ACTIVATIONS=1 starts it with them"),
        ({"activations": True}, r"act\(gate\) and up; CRANE_GATES=1 starts it with them"),
    ],
)
def test_values_of_gates_need_an_engine_that_was_started_with_them(
    configured: tuple[MaskConfig, MaskLibrary], switches: dict[str, bool], message: str
) -> None:
    asked = ActivationRequest({0: None}, (Reduction.MEAN, Reduction.ACT_POSITIVE))
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=asked.argument("key"), n=1, max_tokens=1),
        prompt_token_ids=[3, 4, 5],
        resumable=False,
    )

    def admitted(**switches: bool) -> object:
        config = MaskConfig(*configured[0].fields[:8], **switches)
        model = SimpleNamespace(max_model_len=64)
        return admit_activations(plain_config(additional_config={"crane": config}, model_config=model), request)

    with pytest.raises(ActivationsOff, match=message):
        admitted(**switches)
    admitted(gates=True)
    of_server = MaskConfig(*configured[0].fields[:8], **switches)
    with pytest.raises(ActivationsOff, match="the server was started without"):
        AskedActivations(of_server, of_server.library().fingerprint, None).require(asked, 3, 3)


def test_a_session_with_streamed_input_is_refused(configured: tuple[MaskConfig, MaskLibrary]) -> None:
    engine = plain_config(additional_config={"crane": configured[0]})
    with pytest.raises(MaskError, match="streaming-input sessions"):
        admit(engine, parameters(crane_mask="zh"), resumable=True)


@pytest.mark.parametrize("disabled", [False, True])
def test_an_engine_without_masks_refuses_masked_requests(monkeypatch: pytest.MonkeyPatch, disabled: bool) -> None:
    monkeypatch.setenv("CRANE_DISABLE", "1" if disabled else "0")
    with pytest.raises(MaskError, match="CRANE_DISABLE is set" if disabled else "start it with CRANE_MASKS"):
        admit(plain_config(), parameters(crane_mask="zh"), resumable=False)


@pytest.mark.parametrize("name", ["crane_masks", "mask", "masks", "Neuron_Mask", "maks", "positions", "position"])
def test_a_misspelt_argument_is_refused(configured: tuple[MaskConfig, MaskLibrary], name: str) -> None:
    engine = plain_config(additional_config={"crane": configured[0]})
    with pytest.raises(MaskError, match=f"unknown argument '{name}'; expected 'crane_mask' or 'crane_positions'"):
        admit(engine, parameters(**{name: "zh"}), resumable=False)
    assert admit(engine, parameters(window_size=3, session_id="s"), resumable=False) is None


def test_no_sampling_parameters_ask_for_no_mask() -> None:
    assert requested_mask(None) is None


def test_a_process_that_receives_the_configuration_has_the_plugin(
    configured: tuple[MaskConfig, MaskLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM only logs a plugin that fails to load; an engine process must not go on without it."""

    sent = pickle.dumps(configured[0])
    installed = []
    monkeypatch.setattr(plugin, "install", lambda: installed.append(True))
    pickle.loads(sent)  # noqa: S301
    assert installed == [True]
    monkeypatch.setattr(plugin, "install", lambda: check_version("0.34.0"))
    with pytest.raises(UnsupportedEngine):
        pickle.loads(sent)  # noqa: S301


def test_an_untested_vllm_refuses_masks_even_where_none_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a class that stands for what vLLM calls; the plugin wraps nothing else there."""
    import vllm
    from vllm.v1.engine import input_processor

    class InputProcessor:
        def process_inputs(self, sampling_params: object) -> SimpleNamespace:
            return SimpleNamespace(sampling_params=sampling_params)

    monkeypatch.setattr(input_processor, "InputProcessor", InputProcessor)
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.delenv("CRANE_MASKS", raising=False)
    plugin.register()
    assert InputProcessor().process_inputs(parameters(other=1)).sampling_params.extra_args == {"other": 1}
    with pytest.raises(ValueError, match="not installed in this untested vLLM version"):
        InputProcessor().process_inputs(parameters(crane_mask="zh"))
    monkeypatch.setenv("CRANE_MASKS", "masks")
    with pytest.raises(UnsupportedEngine, match=r"vLLM 0\.34\.0 has not been tested"):
        plugin.register()


@pytest.mark.parametrize("rows", ["0", "-1", "many", ""])
def test_an_unusable_number_of_rows_is_refused(
    configured: tuple[MaskConfig, MaskLibrary], monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    from crane_serve.engine.config import add_mask_config

    monkeypatch.setenv("CRANE_MASKS", str(configured[0].masks))
    monkeypatch.setenv("CRANE_MASK_ROWS", rows)
    engine = SimpleNamespace(model_config=SimpleNamespace(model=configured[0].model), additional_config={})
    with pytest.raises(ValueError, match=r"CRANE_MASK_ROWS is .*, expected the number of masks to keep resident"):
        add_mask_config(engine)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"crane_mask": "zh", "crane_positions": "first"}, "crane_positions: 'first': expected 'all', 'prompt', 'gen"),
        ({"crane_mask": "zh", "crane_positions": 3}, "crane_positions: 3: expected 'all', 'prompt', 'generated'"),
        ({"crane_positions": "prompt"}, "crane_positions='prompt' without crane_mask"),
        ({"Crane_Mask": "zh"}, "unknown argument 'Crane_Mask'"),
    ],
)
def test_bad_positions_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        requested_mask(parameters(**asked))


@pytest.mark.parametrize(("masks", "expected"), [("masks", True), ("", False)])
def test_what_reads_images_is_not_loaded_beside_masks(
    monkeypatch: pytest.MonkeyPatch, masks: str, expected: bool
) -> None:
    monkeypatch.setenv("CRANE_MASKS", masks)
    monkeypatch.setattr(plugin, "add_mask_config", lambda config: None)
    arguments = SimpleNamespace(language_model_only=False)
    config = plugin._create_engine_config(lambda self: SimpleNamespace(additional_config={}), arguments)
    assert config.additional_config == {}
    assert arguments.language_model_only is expected
