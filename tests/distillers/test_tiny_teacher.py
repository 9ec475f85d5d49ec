"""The teacher that ships: a plan finds it by name, its recipe is the plan's, and it knows the tiny world."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mambabench.backends.hybrid import TeacherBackend
from mambabench.backends.plugin import TeacherConfig
from mambabench.distillers.tiny.language import tokenizer
from mambabench.distillers.tiny.writer import TASKS, Writer
from mambabench.harness.interfaces import MambabenchError
from mambabench.harness.plan import read_plan
from mambabench.harness.plugins import registry
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "distillers" / "tiny" / "teacher"
ITEMS = 40


@pytest.fixture(scope="module")
def model():
    return TeacherBackend(TeacherConfig()).module(TEACHER).eval()


def test_a_plan_finds_it_by_name_without_torch(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('schema = 1\n[teacher]\npath = "builtin:tiny"\n')
    found = Path(read_plan(plan, registry()).teacher.path)
    assert (found / "config.json").samefile(TEACHER / "config.json")
    code = "import sys; from mambabench.distillers.tiny.weights import folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@torch.no_grad()
def test_it_is_a_llama_that_transformers_loads(model):
    llama = AutoModelForCausalLM.from_pretrained(TEACHER).eval()
    assert type(llama) is LlamaForCausalLM
    ids = torch.tensor([tokenizer().encode(Writer("unseen", 0, 0).document())])
    torch.testing.assert_close(llama(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-3)


def test_its_recipe_is_a_plan_that_makes_its_shape():
    recipe = json.loads((TEACHER / "recipe.json").read_text())
    plan = read_plan(ROOT / recipe["plan"], registry())
    assert recipe["seed"] in plan.seeds
    assert plan.models[recipe["model"]].backend.name == "hf"
    stage = plan.stages["teach"].config
    config = json.loads((TEACHER / "config.json").read_text())
    names = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "intermediate": "intermediate_size",
        "context": "max_position_embeddings",
    }
    assert {name: getattr(stage, name) for name in names} == {name: config[key] for name, key in names.items()}


def test_its_tokenizer_is_the_language_s():
    words = AutoTokenizer.from_pretrained(TEACHER)
    assert words.get_vocab() == tokenizer().get_vocab()
    assert words.chat_template == tokenizer().chat_template


def taken(folder, out):
    backend = TeacherBackend(TeacherConfig())
    backend.convert(folder, [], out, 0)
    return backend.tokenizer(out)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", '{"a":', "config.json: not JSON"),
        ("config.json", "{}", "config.json: model_type None is not served"),
        ("model.safetensors", "cut", "model.safetensors: not a whole safetensors file"),
        ("model.safetensors", None, "no model.safetensors"),
        ("tokenizer.json", None, "no tokenizer can be loaded"),
        ("tokenizer.json", "{}", "no tokenizer can be loaded"),
        ("tokenizer.json", "cut", "no tokenizer can be loaded"),
        ("tokenizer.json", "[]", "no tokenizer can be loaded"),
    ],
)
def test_what_is_damaged_in_a_copy_is_told_in_one_line(tmp_path, name, text, said):
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    (folder / name).unlink()
    if text == "cut":
        (folder / name).write_bytes((TEACHER / name).read_bytes()[:2000])
    elif text is not None:
        (folder / name).write_text(text)
    with pytest.raises(MambabenchError, match=said) as error:
        taken(folder, tmp_path / "out")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "least"), [("lookup", 0.95), ("copy", 0.95), ("arithmetic", 0.7), ("story", 0.7), ("instruct", 0.8)]
)
@torch.no_grad()
def test_it_writes_the_answers_to_held_out_items(model, task, least):
    words = tokenizer()
    right = 0
    for index in range(ITEMS):
        item = TASKS[task](Writer(f"tasks/{task}", index, 0))
        context, answer = words.encode(item.context), words.encode(item.answer, add_special_tokens=False)
        logits = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        right += logits.argmax(-1).tolist() == answer
    assert right / ITEMS >= least


def test_generate_finds_it_by_name(mambabench):
    item = TASKS["lookup"](Writer("tasks/lookup", 0, 0))
    done = mambabench("generate", "builtin:tiny", "--prompt", item.context, "--new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{item.context} {item.answer} ")
    done = mambabench("generate", "builtin:teeny")
    assert (done.returncode, done.stderr) == (1, "mambabench: unknown teacher 'teeny'; did you mean 'tiny'?\n")
