"""Settings: where they come from, which source wins, and what a wrong one is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from crane_serve.cli import app
from crane_serve.service import process
from crane_serve.service.settings import SECRETS, LogFormat, ServeSettings, SettingError, SettingSource, load_settings

KEY = "an-admin-key-of-some-length"
FILES = {
    "crane.toml": 'port = 9001\nadmin_key = "{key}"\ncors_origins = ["https://a"]\nlog_format = "json"\n',
    "crane.yaml": "port: 9001\nadmin_key: {key}\ncors_origins: [https://a]\nlog_format: json\n",
    "crane.yml": "port: 9001\nadmin_key: {key}\ncors_origins: https://a\nlog_format: json\n",
    "crane.json": '{{"port": 9001, "admin_key": "{key}", "cors_origins": ["https://a"], "log_format": "json"}}',
}


@pytest.fixture(autouse=True)
def required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a directory of masks, from the environment."""
    monkeypatch.setenv("CRANE_MODEL", "a-model")
    monkeypatch.setenv("CRANE_MASKS", str(tmp_path))


def crane(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"}).invoke(app, ["serve", *map(str, arguments)])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    served: list[ServeSettings] = []
    monkeypatch.setattr(process, "serve", lambda settings: served.append(settings) or 0)
    return served


class TestSources:
    @pytest.mark.parametrize("name", FILES)
    def test_a_file_of_each_kind(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text(FILES[name].format(key=KEY))
        loaded = load_settings({}, tmp_path / name)
        settings = loaded.settings
        assert (settings.port, settings.cors_origins, settings.log_format) == (9001, ("https://a",), LogFormat.JSON)
        assert settings.admin_key == SecretStr(KEY)
        assert loaded.sources == {
            "model": SettingSource.ENVIRONMENT,
            "masks": SettingSource.ENVIRONMENT,
            **dict.fromkeys(("port", "admin_key", "cors_origins", "log_format"), SettingSource.FILE),
        }

    def test_flags_then_environment_then_file_then_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "crane.toml"
        file.write_text("port = 1\nmask_rows = 2\nmax_sequences = 3\n")
        monkeypatch.setenv("CRANE_PORT", "4")
        monkeypatch.setenv("CRANE_MASK_ROWS", "5")
        loaded = load_settings({"port": "6"}, file)
        settings = loaded.settings
        assert (settings.port, settings.mask_rows, settings.max_sequences) == (6, 5, 3)
        assert settings.max_connections == 4096
        sources = {name: str(loaded.sources[name]) for name in ("port", "mask_rows", "max_sequences")}
        assert sources == {"port": "flag", "mask_rows": "environment", "max_sequences": "file"}
        assert "max_connections" not in loaded.sources

    def test_the_environment_may_name_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "one.toml").write_text("port = 1")
        (tmp_path / "two.toml").write_text("port = 2")
        monkeypatch.setenv("CRANE_CONFIG", str(tmp_path / "one.toml"))
        assert load_settings({}).settings.port == 1
        assert load_settings({}, tmp_path / "two.toml").settings.port == 2

    def test_lists_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CRANE_CORS_ORIGINS", "https://a, https://b")
        monkeypatch.setenv("CRANE_ENGINE_FLAGS", "--dtype float32 --chat-template 'a b'")
        settings = load_settings({}).settings
        assert settings.cors_origins == ("https://a", "https://b")
        assert settings.engine_flags == ("--dtype", "float32", "--chat-template", "a b")

    def test_switches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: list[ServeSettings]) -> None:
        for arguments, variable, expected in (
            ((), None, True),
            ((), "false", False),
            (("--playground",), "false", True),
            (("--no-playground",), "true", False),
        ):
            monkeypatch.delenv("CRANE_PLAYGROUND", raising=False)
            if variable is not None:
                monkeypatch.setenv("CRANE_PLAYGROUND", variable)
            assert crane("--evaluation", tmp_path, *arguments).exit_code == 0
            assert (served[-1].playground, served[-1].evaluation) == (expected, tmp_path)
        monkeypatch.setenv("CRANE_PLAYGROUND", "perhaps")
        with pytest.raises(SettingError, match=r"playground: .*boolean.*from CRANE_PLAYGROUND"):
            load_settings({})

    def test_variables_of_other_parts_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CRANE_DISABLE", "CRANE_MASK_OUTPUTS", "CRANE_API_KEY"):
            monkeypatch.setenv(name, "1")
        assert load_settings({}).settings.model == "a-model"


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.toml", "prot = 1\nmasc_rows = 2", "unknown settings: prot, masc_rows"),
            ("a.toml", "port = 1\nport = 2", "not a readable mapping: Cannot overwrite a value"),
            ("a.yaml", "- port", "not a readable mapping: "),
            ("a.yaml", f"admin_key: '{KEY}", "not a readable mapping: found unexpected end of stream, line 1"),
            ("a.json", "{", "not a readable mapping: "),
            ("a.ini", "port=1", "expected a name that ends in .toml, .yaml, .yml, .json"),
            ("a.toml", None, "does not exist"),
        ],
    )
    def test_files(self, tmp_path: Path, name: str, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_settings({}, tmp_path / name)
        assert str(caught.value).startswith(f"configuration {tmp_path / name}: "[:-2])
        assert "\n" not in str(caught.value)
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("port", "80000", "port: Input should be less than or equal to 65535, found '80000' (from CRANE_PORT)"),
            ("mask_rows", "0", "mask_rows: Input should be greater than or equal to 1, found '0'"),
            ("max_body_bytes", "many", "max_body_bytes: Input should be a valid integer, "),
            ("request_timeout_s", "inf", "request_timeout_s: Input should be a finite number, found 'inf'"),
            ("log_format", "xml", "log_format: Input should be 'text' or 'json', found 'xml'"),
            ("log_level", "loud", "log_level: Input should be 'debug', 'info', 'warning' or 'error', found 'loud'"),
            ("masks", "/nowhere", "masks: directory '/nowhere' does not exist, found '/nowhere' (from CRANE_MASKS)"),
            ("ssl_keyfile", "key.pem", "ssl_keyfile: expected ssl_certfile"),
        ],
    )
    def test_values(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
        monkeypatch.setenv(f"CRANE_{name.upper()}", value)
        with pytest.raises(SettingError, match=re.escape(message)) as caught:
            load_settings({})
        assert (caught.value.setting, caught.value.source) == (name, SettingSource.ENVIRONMENT)

    @pytest.mark.parametrize("name", ["model", "masks"])
    def test_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.delenv(f"CRANE_{name.upper()}")
        with pytest.raises(SettingError, match=f"{name} is not given, .* CRANE_{name.upper()}") as caught:
            load_settings({})
        assert caught.value.source is None

    def test_a_secret_of_the_wrong_type_is_not_shown(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("admin_key: [12345678]")
        with pytest.raises(SettingError, match="admin_key: Input should be a valid string") as caught:
            load_settings({}, tmp_path / "a.yaml")
        assert "12345678" not in str(caught.value)


class TestCommand:
    def test_every_setting_but_secrets_is_an_option_with_its_default(self) -> None:
        result = crane("--help")
        assert result.exit_code == 0
        words = set(re.findall(r"--[a-z-]+", result.stdout))
        fields = {f"--{name.replace('_', '-')}" for name in ServeSettings.model_fields}
        hidden = {f"--{name.replace('_', '-')}" for name in SECRETS} | {"--model", "--engine-flags"}
        assert fields - words == hidden
        for name in ("max_body_bytes", "port", "log_format"):
            (line,) = (line for line in result.stdout.splitlines() if f"--{name.replace('_', '-')} " in line)
            field = ServeSettings.model_fields[name]
            assert str(field.description) in line
            assert f"[default: ({field.default})]" in line

    def test_options_are_given_on(self, tmp_path: Path, served: list[ServeSettings]) -> None:
        file = tmp_path / "crane.toml"
        file.write_text("port = 1\nmax_sequences = 2\nengine_flags = ['--seed', '1']\n")
        result = crane("--config", file, "--max-sequences", 3, "--cors-origins", "https://a,https://b", "--port=4")
        assert result.exit_code == 0, result.output
        (settings,) = served
        assert (settings.port, settings.max_sequences, settings.cors_origins) == (4, 3, ("https://a", "https://b"))
        assert settings.model == "a-model"
        assert settings.engine_flags == ("--seed", "1")

    @pytest.mark.parametrize(
        ("arguments", "model", "flags"),
        [
            (("other",), "other", ()),
            (("other", "--dtype", "float32"), "other", ("--dtype", "float32")),
            (("--dtype", "float32"), "a-model", ("--dtype", "float32")),
            (("--enforce-eager", "--port", "1"), "a-model", ("--enforce-eager",)),
        ],
    )
    def test_flags_of_vllm_are_no_model(
        self, served: list[ServeSettings], arguments: tuple[str, ...], model: str, flags: tuple[str, ...]
    ) -> None:
        assert crane(*arguments).exit_code == 0
        assert (served[0].model, served[0].engine_flags) == (model, flags)

    @pytest.mark.parametrize("secret", sorted(SECRETS))
    def test_a_secret_is_no_flag(self, served: list[ServeSettings], secret: str) -> None:
        flag = f"--{secret.replace('_', '-')}"
        crane("m", flag, KEY)
        assert getattr(served[0], secret) is None
        assert served[0].engine_flags == (flag, KEY)  # which vLLM refuses as unknown

    def test_the_largest_body_must_fit_into_what_is_buffered(self, served: list[ServeSettings]) -> None:
        result = crane("m", "--max-body-bytes", 2**30)
        assert result.exit_code == 2
        expected = "max_buffered_bytes: expected at least the 1073741824 of max_body_bytes, found '536870912' (from its"
        assert expected in " ".join(result.stderr.replace("│", " ").split())
        assert crane("m", "--max-body-bytes", 2**30, "--max-buffered-bytes", 2**30).exit_code == 0

    def test_a_wrong_option_is_wrong_usage(self, served: list[ServeSettings]) -> None:
        result = crane("m", "--port", "80000")
        assert result.exit_code == 2
        assert "Invalid value for '--port': port: Input should be less than or equal to 65535" in result.stderr
        assert served == []

    def test_a_wrong_variable_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CRANE_PORT", "80000")
        result = crane("m")
        assert result.exit_code == 1
        message = "port: Input should be less than or equal to 65535, found '80000' (from CRANE_PORT)"
        assert result.stderr == f"error: {message}\n"

    def test_the_effective_settings_are_printed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: list[ServeSettings]
    ) -> None:
        monkeypatch.setenv("CRANE_ADMIN_KEY", KEY)
        result = crane("--print-config", "--port", "9")
        assert result.exit_code == 0
        shown: dict[str, dict[str, Any]] = json.loads(result.stdout)
        assert set(shown["settings"]) == set(ServeSettings.model_fields)
        assert shown["settings"]["port"] == 9
        assert shown["settings"]["admin_key"] == "**********"
        assert shown["settings"]["user_key"] is None
        assert shown["sources"] == {
            "model": "environment",
            "masks": "environment",
            "admin_key": "environment",
            "port": "flag",
        }
        assert KEY not in result.output
        assert served == []
