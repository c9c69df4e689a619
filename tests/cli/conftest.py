"""`dpofast train` on a tiny model."""

import json

import pytest


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # Not above: pytest may load this file before tests/conftest.py chooses Triton's interpreter.
    from tests.support.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path, model_dir, capsys):
    """Runs `dpofast train` on JSON lines; returns (exit code, stdout, stderr, output folder)."""

    from dpofast.cli.main import main

    def train(lines, *flags, model=model_dir):
        data = tmp_path / "pairs.jsonl"
        if lines is not None:
            data.write_bytes(
                b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
            )
        output = tmp_path / "out"
        arguments = ["train", "--model", str(model), "--data", str(data), "--output_dir", str(output)]
        code = main([*arguments, "--use_cpu", "--report_to", "none", "--logging_steps", "1", *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, output

    return train
