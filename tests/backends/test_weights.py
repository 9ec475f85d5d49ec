"""Weights are copied from folder to folder in shards, whatever files they came from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambabench import MambabenchError
from mambabench.backends import weights
from mambabench.backends.hybrid import Mamba2HybridBackend, TeacherBackend
from mambabench.backends.weights import PICKLED, SINGLE, Weights, index_of, write
from transformers import AutoModelForCausalLM


def test_a_folder_of_shards_is_the_same_model(
    llama: Path, half: Path, hybrid_backend: Mamba2HybridBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD", 20_000)
    write(tmp_path / "llama", Weights(llama).items())
    (tmp_path / "llama" / "config.json").write_bytes((llama / "config.json").read_bytes())
    hybrid_backend.convert(tmp_path / "llama", [1, 3], tmp_path / "half", seed=0)
    hybrid_backend.convert(tmp_path / "half", [3], tmp_path / "quarter", seed=0)
    files = sorted(path.name for path in (tmp_path / "half").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert all(path.stat().st_size < 24_000 for path in (tmp_path / "half").glob("*.safetensors"))
    one, many = Weights(half), Weights(tmp_path / "half")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    ids = torch.randint(61, (1, 9))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert torch.equal(loaded(input_ids=ids).logits, hybrid_backend.module(half)(input_ids=ids).logits)


def test_a_teacher_in_shards_is_taken_over_by_links(
    llama: Path, teacher_backend: TeacherBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD", 20_000)
    write(tmp_path / "llama", Weights(llama).items())
    (tmp_path / "llama" / "config.json").write_bytes((llama / "config.json").read_bytes())
    teacher_backend.convert(tmp_path / "llama", range(4), tmp_path / "artifact", seed=0)
    for path in (tmp_path / "llama").glob("*.safetensors"):
        assert path.samefile(tmp_path / "artifact" / path.name)
    assert teacher_backend.describe(tmp_path / "artifact")["parameters"] == sum(
        t.numel() for t in Weights(llama).values()
    )


@pytest.fixture(params=["one file", "shards", "old format"])
def pickled(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Path:
    """The Llama as PyTorch's own files, its tied head in them as well."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = dict(Weights(llama))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if request.param == "shards" else [names]
    files = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)] if len(parts) > 1 else [PICKLED]
    for file, part in zip(files, parts, strict=True):
        whole = {name: tensors[name].clone() for name in part}
        torch.save(whole, folder / file, _use_new_zipfile_serialization=request.param != "old format")
    if len(parts) > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_pytorch_s_own_files_are_the_same_model(
    pickled: Path, llama: Path, half: Path, teacher_backend: TeacherBackend, hybrid_backend: Mamba2HybridBackend
) -> None:
    ids = torch.randint(61, (1, 9))
    want = teacher_backend.module(llama)(input_ids=ids).logits
    assert torch.equal(teacher_backend.module(pickled)(input_ids=ids).logits, want)
    assert teacher_backend.describe(pickled) == teacher_backend.describe(llama)
    teacher_backend.convert(pickled, range(4), pickled.parent / "taken", seed=0)
    hybrid_backend.convert(pickled, [1, 3], pickled.parent / "half", seed=0)
    for made, like in (("taken", llama), ("half", half)):
        assert [path.name for path in (pickled.parent / made).glob("*.bin")] == []
        new, old = Weights(pickled.parent / made), Weights(like)
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in old)


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Evil()}, "not a whole file of tensors alone"),
        ([torch.zeros(2)], "not a mapping of names to tensors"),
        ({"step": 3}, "not a mapping of names to tensors"),
    ],
)
def test_nothing_but_tensors_is_taken_from_them(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / PICKLED)
    with pytest.raises(MambabenchError, match=f"{PICKLED}: {message}"):
        Weights(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_torn_one_is_named(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.zeros(500)}, tmp_path / PICKLED)
    whole = (tmp_path / PICKLED).read_bytes()
    for rest in (whole[:700], b""):
        (tmp_path / PICKLED).write_bytes(rest)
        with pytest.raises(MambabenchError, match=f"{PICKLED}: not a whole file of tensors alone"):
            Weights(tmp_path)


def test_a_shard_that_is_missing_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD", 20_000)
    write(tmp_path, Weights(llama).items())
    lost = next(tmp_path.glob("model-00002-*"))
    lost.unlink()
    with pytest.raises(MambabenchError, match=f"{lost.name}: the file is missing, but the index names it"):
        Weights(tmp_path)


@pytest.mark.parametrize("single", [SINGLE, PICKLED])
def test_an_index_that_lacks_a_tensor_or_names_no_file_is_named(llama: Path, tmp_path: Path, single: str) -> None:
    shard, (name, *others) = f"part{Path(single).suffix}", list(Weights(llama))
    if single == SINGLE:
        write(tmp_path, Weights(llama).items())
        (tmp_path / SINGLE).replace(tmp_path / shard)
    else:
        torch.save(dict(Weights(llama)), tmp_path / shard)
    index = index_of(tmp_path / single)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(others, shard)}))
    with pytest.raises(MambabenchError, match=rf"{index.name}: weight_map lacks tensor {name}, which {shard} has"):
        Weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(others, shard), name: 1}}))
    with pytest.raises(MambabenchError, match=rf"{index.name}: weight_map names 1 as the file of tensor {name}"):
        Weights(tmp_path)


def test_what_was_not_trained_stays_as_it_stood_on_disk(
    make_llama: Callable[..., Path], hybrid_backend: Mamba2HybridBackend, tmp_path: Path
) -> None:
    """A model is trained in fp32; weights that are the parent's to the last bit are written in the parent's 16."""
    folder = make_llama(tie_word_embeddings=False)
    sixteen = tmp_path / "sixteen"
    write(sixteen, ((name, tensor.bfloat16()) for name, tensor in Weights(folder).items()))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (sixteen / name).write_bytes((folder / name).read_bytes())
    hybrid_backend.convert(sixteen, [1, 3], tmp_path / "half", seed=0)
    model = hybrid_backend.module(tmp_path / "half")
    trained = "model.layers.0.mamba.in_proj.weight"
    with torch.no_grad():
        model.get_parameter(trained)[0, 0] += 1e-6
    hybrid_backend.save(model, tmp_path / "saved", like=tmp_path / "half")
    before, after = Weights(tmp_path / "half"), Weights(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name == trained:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, model.get_parameter(name))
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert hybrid_backend.frozen(tmp_path / "saved", "cpu").lm_head.weight.dtype == torch.float32


@pytest.mark.gpu
def test_a_model_that_is_only_asked_goes_to_the_gpu_in_16_bits(half: Path, hybrid_backend: Mamba2HybridBackend) -> None:
    model = hybrid_backend.frozen(half, "cuda:0")
    exact = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in exact} == {"A_log", "D", "dt_bias"}
    assert all(tensor.is_cuda and not tensor.requires_grad for tensor in model.parameters())
