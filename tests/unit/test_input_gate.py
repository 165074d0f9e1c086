"""Whatever is given as a configuration or an override is answered at once, with a documented code and no traceback."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_trainer.config.load import check_source, load_config, to_yaml
from lora_trainer.config.source import Source, read_source
from lora_trainer.errors import ConfigError
from lora_trainer.planning.run_plan import plan_run
from lora_trainer.storage.atomic_files import read_regular

BASE = "name: x\nmodel: {path: b}\ndata: {dir: d}\ntrain: {max_steps: 5}\n"
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(BASE)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "alias"),
        ("a: &a [*a]", "alias"),
        (f"{BASE}x: &x {{a: 1}}\ny: {{<<: *x}}", "merge key"),
        (f"{BASE}sample: {{<<: {{every_steps: 5}}}}", "merge key"),
        (f"{BASE}x: !!omap [a: 1]", "tag"),
        (f"{BASE}x: !!python/object:os.system 1", "tag"),
        ("[" * 50_000, "levels"),
        ("a: " + "{a: " * 5_000, "levels"),
        (f"{BASE}x: [{'1, ' * 200_000}1]", "keys and values"),
        ("".join(f"k{number}: 1\n" for number in range(60_000)), "keys and values"),
        ("".join(f"k{number}: 1\n" for number in range(4_000)), "not a setting"),
        (f"{BASE}seed: {'9' * 5_000}", "not valid YAML"),
        (f'{BASE}output_dir: "a\\0b"', "U+0000"),
        (f'{BASE}output_dir: "a\\ud800b"', "U+D800"),
        (f"{BASE}output_dir: {'a' * 300}", "255 bytes"),
        (f"{BASE}output_dir: ~nosuchuser/x", "nosuchuser"),
        (f"{BASE}seed: .nan", "seed"),
        (f"{BASE}seed: [{'1, ' * 5000}1]", "seed"),
        (BASE.replace("max_steps: 5", "epochs: 1e12"), "1000000"),
        (BASE.replace("max_steps: 5", "max_steps: 1e7"), "1000000"),
        ("", "mapping"),
    ],
)
def test_a_hostile_file_is_refused_at_once(config: Path, text: str, said: str) -> None:
    config.write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert time.process_time() - start < 5


def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(10 * 2**30)
    for file in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, tmp_path / "large", Path("a\0b"), tmp_path / "none"):
        with pytest.raises(OSError):
            read_regular(file)
        with pytest.raises(ConfigError):
            read_source(file)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=2024-05-01", "2024-05-01"),
        ("name=001", "001"),
        ("name=null", "null"),
        ("model.path=a #1: b", "a #1: b"),
        ("model.path=[x]", "[x]"),
        ("model.path=x ", "x "),
        ("model.path=*x", "*x"),
        ("data.captions.extension=.1", ".1"),
        ("output_dir=yes\x85no", "yes\x85no"),
        ("data.cache_dir=null", None),
        ("data.cache_dir=007", "007"),
        ("sample.prompts=a heart #3", "a heart #3"),
    ],
)
def test_an_override_of_a_text_is_that_text(config: Path, override: str, value: object) -> None:
    node: object = read_source(config, [override]).data
    for part in override.partition("=")[0].split("."):
        assert isinstance(node, dict)
        node = node[part]
    assert node == value


@pytest.mark.parametrize(
    "text", ["a\x85b", "a\u2028b", "\ufeffa", "a\u200bb", " a ", "a\tb", "a\nb\n", "\x1b[31m", "é–"]
)
def test_every_text_survives_its_file(config: Path, text: str) -> None:
    source = read_source(config)
    written = check_source(Source({**source.data, "sample": {"prompts": [{"prompt": text, "negative_prompt": text}]}}))
    config.write_text(to_yaml(written), encoding="utf-8")
    assert load_config(config) == written


def test_a_date_in_a_file_is_text(config: Path) -> None:
    config.write_text(BASE.replace("name: x", "name: 2024-05-01"))
    assert load_config(config).name == "2024-05-01"


def test_a_letter_that_looks_like_another_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"U\+2212 MINUS SIGN"):
        load_config(config, ["optimizer.lr=1e−4"])


def test_a_length_that_no_machine_can_train_is_refused(config: Path) -> None:
    endless = load_config(config, ["train={epochs: 1000000}"])
    with pytest.raises(ConfigError, match="more than 1,000,000 updates"):
        plan_run(endless, denoiser="unet", num_images=9, bucket_sizes=[9], num_processes=1, target_shapes={})
