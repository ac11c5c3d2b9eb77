#!/usr/bin/env python3
"""Makes tests/reference/fixtures/*.safetensors from models.py; see README.md beside it.

    python3 tests/reference/make_fixtures.py            all cases
    python3 tests/reference/make_fixtures.py jamba      some cases
    python3 tests/reference/make_fixtures.py --search   tries seeds for cases whose seed fails
"""

import array
import json
import math
import pathlib
import random
import struct
import sys

import torch

sys.dont_write_bytecode = True  # no __pycache__ in the source tree

import models
from models import MODEL_DEFAULTS, TRAIN_DEFAULTS, Settings, is_state, shapes

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"

# ----------------------------------------------------------------------------------------- cases

CASES = {}


def case(name, about, model, train=None, seed=1, starved=False):
    """One fixture. starved: some expert gets no token at step 0 (else every expert gets one)."""
    model = {"vocabulary": 48, "width": 16, "blocks": 1, "state": 8, "experts": 4,
             "expert_hidden": 12, "feed_forward_hidden": 20, "heads": 2, "dt_rank": 2, **model}
    CASES[name] = (about, model, train or {}, seed, starved)


case("transformer", "Dense Transformer of the paper's v2: rotary positions, ReLU with biases.",
     dict(pattern=["attention, feed_forward"], blocks=2, positions="ROPE"),
     dict(lr=5e-3, grad_clip=6.0))
case("transformer_v1", "Dense Transformer of the paper's v1: a table of learned positions.",
     dict(pattern=["attention, feed_forward"], blocks=2, positions="LEARNED", heads=4))
case("transformer_moe", "Switch Transformer: attention and top-1 experts, capacity factor 1.",
     dict(pattern=["attention, moe"], blocks=2, positions="ROPE", experts=4, capacity_factor=1.0),
     dict(routing_group=2))
case("mamba", "Mamba layers only, dt_rank from the width, 16 states.",
     dict(pattern=["mamba"], blocks=2, width=20, dt_rank=0, state=16))
case("mamba_mlp", "Mamba and a dense feed-forward layer in turn.",
     dict(pattern=["mamba, feed_forward"], blocks=2),
     dict(grad_clip=0.0))
case("moe_mamba", "MoE-Mamba: top-1, capacity factor 1, the whole batch is one routing group.",
     dict(pattern=["mamba, moe"], blocks=2, capacity_factor=1.0, balance_loss=0.01),
     dict(global_batch_size=4, routing_group=4))
case("moe_mamba_topk", "Top-2 without drops, renormalised, z-loss; each sequence is a group.",
     dict(pattern=["mamba, moe"], blocks=2, experts=5, top_k=2, renormalise=True, z_loss=1e-2,
          balance_loss=0.02),
     dict(global_batch_size=3, routing_group=1, grad_clip=2.5))
case("parallel", "Parallel MoE-Mamba: both layers side by side under one norm.",
     dict(pattern=["mamba + moe"], blocks=2, capacity_factor=1.25),
     dict(routing_group=2))
case("inner_conv", "Inner MoE: bottleneck experts into convolution and scan; drops.",
     dict(pattern=["inner_moe"], blocks=2, projections=["CONV"], projection_hidden=10,
          capacity_factor=1.0),
     dict(routing_group=2))
case("inner_gate", "Inner MoE: bottleneck experts as the gate; drops.",
     dict(pattern=["inner_moe"], blocks=2, projections=["GATE"], projection_hidden=10,
          capacity_factor=1.0),
     dict(routing_group=2), seed=2)
case("inner_output", "Inner MoE: bottleneck experts as the output projection; top-2 with drops.",
     dict(pattern=["inner_moe"], blocks=2, projections=["OUTPUT"], projection_hidden=10,
          capacity_factor=1.25, top_k=2), seed=2)
case("inner_all_three", "Inner MoE in all three projections, a router each, capacity factor 1.",
     dict(pattern=["inner_moe"], blocks=2, projections=["CONV", "GATE", "OUTPUT"],
          projection_hidden=8, experts=3, capacity_factor=1.0),
     dict(routing_group=2))
case("inner_alternate", "Plain Mamba and inner MoE (convolution and gate) block by block.",
     dict(pattern=["mamba", "inner_moe"], blocks=2, projections=["CONV", "GATE"],
          projection_hidden=10, capacity_factor=1.0),
     dict(routing_group=2))
case("ratio", "Fractional expand: 1.37 * 16 gives 21 inner channels.",
     dict(pattern=["mamba, moe"], blocks=2, expand=1.37, experts=5), seed=2)
case("mixtral", "Mixtral's shape: grouped-query attention, RMSNorm, SwiGLU experts, top-2.",
     dict(pattern=["attention, moe"], blocks=2, norm="RMS_NORM", heads=4, kv_heads=2,
          positions="ROPE", rope_base=1e6, experts=4, top_k=2, renormalise=True,
          expert_activation="SWIGLU", expert_hidden=10, final_norm=True, balance_loss=0.02))
case("jamba", "Jamba's Mamba and experts: norms on dt, B, C; top-2 not renormalised; SwiGLU.",
     dict(pattern=["mamba, feed_forward", "mamba, moe"], blocks=2, norm="RMS_NORM", norm_eps=1e-6,
          mamba_norms=True, dt_rank=4, experts=4, top_k=2, expert_activation="SWIGLU",
          expert_hidden=10, feed_forward_activation="SWIGLU", feed_forward_bias=False,
          final_norm=True, balance_loss=1e-3))
case("routing_mamba", "Routing Mamba: linear experts in three projections, one router, top-1.",
     dict(pattern=["inner_moe"], projections=["CONV", "GATE", "OUTPUT"],
          projection_experts="LINEAR"))
case("routing_mamba_top2", "Routing Mamba with top-2, renormalised, and drops.",
     dict(pattern=["inner_moe"], projections=["CONV", "GATE", "OUTPUT"],
          projection_experts="LINEAR", top_k=2, renormalise=True, capacity_factor=1.0,
          z_loss=1e-3),
     dict(global_batch_size=4, routing_group=2))
case("routing_mamba_part", "Routing Mamba without the output: weights reach only the balance loss.",
     dict(pattern=["inner_moe"], projections=["CONV", "GATE"], projection_experts="LINEAR"))
case("sigmoid_bias", "Sigmoid router balanced by a bias, shared expert, SwiGLU, top-2, scale 2.5.",
     dict(pattern=["mamba, moe"], blocks=2, width=12, router="SIGMOID", router_bias_rate=0.01,
          renormalise=True, routed_scale=2.5, shared_hidden=14, expert_activation="SWIGLU",
          top_k=2, experts=5, expert_hidden=10))
case("post_norm", "Norm after each layer's addition, GELU.",
     dict(pattern=["mamba, feed_forward", "attention, moe"], blocks=2, norm_place="POST",
          feed_forward_activation="GELU", expert_activation="GELU"), seed=3)
case("documents", "Convolution, scan and attention reset at the starts of documents.",
     dict(pattern=["attention, mamba, moe"], blocks=2, state=4, expand=1.5, positions="ROPE",
          reset_at_documents=True),
     dict(sequence_length=16), seed=2)
case("length_1", "Sequences of one token: shorter than the convolution.",
     dict(pattern=["mamba, moe", "attention, feed_forward"], blocks=2, positions="ROPE",
          experts=3),
     dict(sequence_length=1, global_batch_size=16, routing_group=16))
case("length_7", "Sequences of seven tokens; SiLU experts.",
     dict(pattern=["mamba, moe"], expert_activation="SILU", capacity_factor=1.0),
     dict(sequence_length=7, global_batch_size=4, routing_group=2))
case("length_372", "Sequences of 372 tokens.",
     dict(pattern=["mamba, moe", "attention, feed_forward"], blocks=2, width=8,
          positions="ROPE", capacity_factor=1.0),
     dict(sequence_length=372, global_batch_size=1))
case("state_64", "64 states, a convolution of three taps, other AdamW settings.",
     dict(pattern=["mamba"], width=12, state=64, conv=3),
     dict(beta1=0.8, beta2=0.95, adam_eps=1e-6))
case("batch_1", "A batch of one sequence.",
     dict(pattern=["mamba, moe"], capacity_factor=1.0),
     dict(global_batch_size=1, sequence_length=16, warmup_steps=1, final_lr_fraction=0.0))
case("starved_expert", "One expert gets no token at step 0.",
     dict(pattern=["mamba, moe"], blocks=2, experts=6),
     dict(sequence_length=10), starved=True, seed=2)
case("attention_bias", "Attention with biases, heads wider than width / heads; SwiGLU with biases.",
     dict(pattern=["attention, feed_forward"], blocks=2, heads=4, kv_heads=1, head_width=6,
          attention_bias=True, positions="ROPE", feed_forward_activation="SWIGLU"))
case("accumulation", "Micro-batches: the step is that of the whole batch.",
     dict(pattern=["mamba, moe"], capacity_factor=1.0),
     dict(global_batch_size=4, micro_batch_size=2, routing_group=2))

# ------------------------------------------------------------------------- weights and the stream


class Draw:
    """Random numbers that are the same with every version of Python and PyTorch."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def uniform(self, low, high):
        return low + (high - low) * self.random.random()

    def normal(self):
        radius = math.sqrt(-2 * math.log(1 - self.random.random()))
        return radius * math.cos(2 * math.pi * self.random.random())


def initial_values(name, shape, draw):
    """Values of healthy size for one tensor, as a list: every tensor should get a gradient."""
    count = math.prod(shape)
    fan_in = shape[-1]

    def normals(mean, deviation):
        return [mean + deviation * draw.normal() for _ in range(count)]

    if is_state(name):
        return [0.0] * count
    if name.endswith(".A_log"):
        return [math.log(1 + i % fan_in) + 0.1 * draw.normal() for i in range(count)]
    if name.endswith(".D") or name.endswith("norm.weight"):
        return normals(1, 0.2)
    if name.endswith("dt_proj.bias"):  # softplus(bias) = 0.01 ... 0.5
        steps = [math.exp(draw.uniform(math.log(0.01), math.log(0.5))) for _ in range(count)]
        return [dt + math.log(-math.expm1(-dt)) for dt in steps]
    if name.endswith(".bias"):
        return normals(0, 0.2)
    if name == "embedding.weight":
        return normals(0, 0.7)
    if name == "embedding.positions.weight":
        return normals(0, 0.3)
    if name.endswith("conv1d.weight"):
        return normals(0, 0.4)
    if name.endswith("x_proj.weight"):
        return normals(0, 2 / math.sqrt(fan_in))
    if name.endswith("out_proj.router.weight"):  # its input, the gated scan, is small
        return normals(0, 8 / math.sqrt(fan_in))
    if name.endswith("router.weight"):
        return normals(0, 1.5 / math.sqrt(fan_in))
    return normals(0, 1 / math.sqrt(fan_in))


def initial_tensors(settings, train, seed):
    draw = Draw(seed)
    out = {}
    for name, shape in shapes(settings, train.sequence_length).items():
        values = initial_values(name, shape, draw)
        out[name] = torch.tensor(values, dtype=torch.float64).float().reshape(shape)
    return out


def token_stream(settings, train, seed):
    """A stream with something to learn: often a token follows from the one before it."""
    draw = random.Random(seed + 1000)
    count = train.steps * train.global_batch_size * train.sequence_length + 1
    stream = []
    for _ in range(count):
        if settings.reset_at_documents and draw.random() < 0.15:
            token = models.END_OF_DOCUMENT
        elif stream and draw.random() < 0.6:
            token = (stream[-1] * 5 + 7) % settings.vocabulary
        else:
            token = int(draw.random() ** 2 * settings.vocabulary)
        stream.append(token)
    return stream


# ------------------------------------------------------------------------------------------ files


def field(name, value):
    """One setting in protobuf's text format."""
    if isinstance(value, list):
        return " ".join(field(name, one) for one in value)
    if isinstance(value, bool):
        return f"{name}: {'true' if value else 'false'}"
    if isinstance(value, str):
        return f"{name}: {json.dumps(value)}" if name == "pattern" else f"{name}: {value}"
    return f"{name}: {value!r}"


def model_text(given):
    """Every setting that the case depends on."""
    c = {**MODEL_DEFAULTS, **given}
    kinds = {kind for block in range(c["blocks"])
             for layer in Settings(MODEL_DEFAULTS, **given).layers(block) for kind in layer}
    names = ["vocabulary", "width", "blocks", "pattern", "norm", "norm_place", "norm_eps",
             "final_norm", "reset_at_documents"]
    if kinds & {"mamba", "inner_moe"}:
        names += ["expand", "state", "conv", "dt_rank", "mamba_norms"]
    if kinds & {"moe", "inner_moe"}:
        names += ["experts", "top_k", "capacity_factor", "renormalise", "balance_loss", "z_loss",
                  "router", "router_bias_rate", "routed_scale"]
    if "moe" in kinds:
        names += ["expert_hidden", "expert_activation", "shared_hidden"]
    if "inner_moe" in kinds:
        names += ["projections", "projection_experts"]
        if c["projection_experts"] == "BOTTLENECK":
            names += ["projection_hidden"]
    if "attention" in kinds:
        names += ["heads", "kv_heads", "head_width", "attention_bias", "positions"]
        if c["positions"] == "ROPE":
            names += ["rope_base"]
    if "feed_forward" in kinds:
        names += ["feed_forward_hidden", "feed_forward_activation", "feed_forward_bias"]
    return " ".join(field(name, c[name]) for name in names)


def train_text(given):
    return " ".join(field(name, value) for name, value in {**TRAIN_DEFAULTS, **given}.items())


TYPES = {"F64": ("d", torch.float64), "F32": ("f", torch.float32), "I32": ("i", torch.int32)}


def write_safetensors(path, metadata, tensors):
    """tensors: name -> (dtype, torch tensor). The data start on a border of 64 bytes."""
    header = {"__metadata__": metadata}
    data = bytearray()
    # Eight-byte numbers first, so that each tensor is aligned to its own numbers.
    for name, (dtype, tensor) in sorted(tensors.items(), key=lambda item: item[1][0] != "F64"):
        code, kind = TYPES[dtype]
        numbers = array.array(code, tensor.to(kind).reshape(-1).tolist())
        if sys.byteorder == "big":
            numbers.byteswap()
        start = len(data)
        data += numbers.tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape),
                        "data_offsets": [start, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# ----------------------------------------------------------------------------------------- making

STEP_0_MARGIN = 1e-4   # least gap of a choice at step 0
LATER_MARGIN = 3e-5    # least gap of a choice in the single-precision run
KINK = 1e-5            # least |input| of a ReLU at step 0
GRADIENT = 5e-6        # most relative gap of a gradient in single and double precision
DRIFT = 1e-5           # most relative gap between the losses in single and double precision


def least(margins):
    """The least gap; ties that are exact are none (rows of zeros behind a dropped gate)."""
    return min((float(m) for m in margins.reshape(-1) if m > 0), default=math.inf)


def examine(settings, train, tensors, stream, starved):
    """Runs a case. Returns (what the fixture holds, figures for the report, what is wrong)."""
    wrong = []
    found = {"choices": {torch.float64: [], torch.float32: []}, "later": math.inf}

    def watch(step, model, parts):
        routers = [routing for _, routing in model.routings]
        found["choices"][model["head.weight"].dtype].append([r.experts for r in routers])
        if model["head.weight"].dtype == torch.float32:
            found["later"] = min([found["later"]] + [least(r.margins) for r in routers])
            if step == 0:
                found["apart"] = max(
                    (float((model[name].grad - g).norm()) / max(float(g.norm()), 1e-30), name)
                    for name, g in found["grad"].items() if float(g.norm()) > 0)
        elif step == 0:
            found["loss0"] = parts
            found["kink"] = model.kink
            found["grad"] = {name: tensor.grad.clone() for name, tensor in model.tensors.items()
                             if not is_state(name)}
            found["routings"] = model.routings

    models.run(settings, train, tensors, stream, torch.float64, steps=1, watch=watch)
    routers = [routing for _, routing in found["routings"]]
    margin = min([least(r.margins) for r in routers], default=math.inf)
    if margin < STEP_0_MARGIN:
        wrong.append(f"margin {margin:.1e} at step 0")
    if found["kink"] < KINK:
        wrong.append(f"ReLU input {found['kink']:.1e} at step 0")
    hungry = [f"{name} {e}" for name, r in found["routings"] for e in range(settings.experts)
              if not bool(((r.experts == e) & r.kept).any())]
    if bool(hungry) != starved:
        wrong.append(f"experts without tokens: {hungry}")
    if starved and len(hungry) != 1:
        wrong.append("not just one expert without tokens")
    if settings.capacity_factor > 0 and all(bool(r.kept.all()) for r in routers):
        wrong.append("nothing is dropped")
    if wrong:
        return None, None, wrong

    found["choices"][torch.float64].clear()
    double = models.run(settings, train, tensors, stream, torch.float64, watch=watch)
    losses = models.run(settings, train, tensors, stream, torch.float32, watch=watch)
    drift = max(abs(a - b) / abs(b) for a, b in zip(losses, double))
    if drift > DRIFT:
        wrong.append(f"single and double precision differ by {drift:.1e}")
    if abs(losses[0] - found["loss0"][0]) > 1e-6 * abs(found["loss0"][0]):
        wrong.append("single and double precision differ at step 0")
    if found["apart"][0] > GRADIENT:
        wrong.append("gradients in single and double precision: {:.1e} {}".format(*found["apart"]))
    if found["later"] < LATER_MARGIN:
        wrong.append(f"margin {found['later']:.1e} in training")
    same = all(torch.equal(a, b) for one, other in zip(*found["choices"].values())
               for a, b in zip(one, other))
    if not same:
        wrong.append("single and double precision choose other experts")
    if not min(losses[-3:]) < losses[0] - 0.05:
        wrong.append(f"the loss does not fall: {losses[0]:.3f} to {losses[-1]:.3f}")

    tensors_out = {"tokens": ("I32", torch.tensor(stream)),
                   "loss0": ("F64", torch.tensor(found["loss0"], dtype=torch.float64)),
                   "losses": ("F64", torch.tensor(losses, dtype=torch.float64))}
    if routers:
        tensors_out["experts"] = ("I32", torch.stack([r.experts for r in routers]))
        tensors_out["margins"] = ("F32", torch.stack([r.margins for r in routers]))
    for name, tensor in tensors.items():
        tensors_out["init/" + name] = ("F32", tensor)
    for name, gradient in found["grad"].items():
        tensors_out["grad/" + name] = ("F32", gradient)

    margins = torch.cat([r.margins for r in routers]) if routers else torch.ones(1)
    figures = {
        "loss": losses, "drift": drift, "apart": found["apart"],
        "margin": margin, "later": found["later"],
        "close": float((margins < 1e-5).double().mean()),
        "dropped": sum(int((~r.kept).sum()) for r in routers),
        "zero": [name for name, g in found["grad"].items() if float(g.abs().max()) == 0],
        "least": min((float(g.norm()), name) for name, g in found["grad"].items()
                     if float(g.abs().max()) > 0),
        "norm": math.sqrt(sum(float((g ** 2).sum()) for g in found["grad"].values())),
        "parameters": sum(g.numel() for g in found["grad"].values())}
    return tensors_out, figures, wrong


def check_differences(settings, train, tensors, stream, entries=60):
    """Largest gap between autograd and central differences, relative to each tensor's norm."""
    own = {name: tensor.double() for name, tensor in tensors.items()}
    batch = models.batch_of(stream, 0, train)
    for name, tensor in own.items():
        tensor.requires_grad_(not is_state(name))
    model = models.Model(settings, own, train.routing_group)
    model.loss(*batch)[0].backward()
    draw = random.Random(7)
    names = [name for name in own if not is_state(name)]
    worst, size = 0.0, 1e-6
    for i in range(entries):
        name = names[i % len(names)]
        flat = own[name].detach().reshape(-1)
        gradient = own[name].grad.reshape(-1)
        at = draw.randrange(flat.numel())
        if float(gradient[at]) == 0:
            at = int(gradient.abs().argmax())
        value = float(flat[at])
        with torch.no_grad():
            flat[at] = value + size
            above = float(model.loss(*batch)[0])
            flat[at] = value - size
            below = float(model.loss(*batch)[0])
            flat[at] = value
        gap = abs((above - below) / (2 * size) - float(gradient[at]))
        worst = max(worst, gap / max(1e-3, float(gradient.norm())))
    return worst


def make(name, search):
    about, model, train_given, seed, starved = CASES[name]
    settings = Settings(MODEL_DEFAULTS, **model)
    train = Settings(TRAIN_DEFAULTS, **train_given)
    last = seed + 300 if search else seed
    while True:
        tensors = initial_tensors(settings, train, seed)
        stream = token_stream(settings, train, seed)
        out, figures, wrong = examine(settings, train, tensors, stream, starved)
        if not wrong or seed == last:
            break
        print(f"  {name}: seed {seed}: {'; '.join(wrong)}", flush=True)
        seed += 1
    if wrong:
        print(f"{name}: WRONG: {'; '.join(wrong)}")
        return False
    if seed != CASES[name][3]:
        print(f"{name}: use seed={seed}")
    metadata = {"about": about, "end_of_document": str(models.END_OF_DOCUMENT),
                "model": model_text(model), "train": train_text(train_given)}
    path = FIXTURES / f"{name}.safetensors"
    write_safetensors(path, metadata, out)
    loss = figures["loss"]
    print(f"{name}: {path.stat().st_size / 1024:.0f} KiB, {figures['parameters']} parameters, loss "
          f"{loss[0]:.4f} to {loss[-1]:.4f}, f32 against f64 {figures['drift']:.0e}, "
          f"of gradients {figures['apart'][0]:.0e} ({figures['apart'][1]}), gradient norm "
          f"{figures['norm']:.2f}, least {figures['least'][0]:.1e} ({figures['least'][1]}), "
          f"margin {figures['margin']:.1e} at step 0 and {figures['later']:.1e} later, "
          f"{figures['close'] * 100:.1f} % below 1e-5, dropped {figures['dropped']}")
    if figures["zero"]:
        print(f"  no gradient: {', '.join(figures['zero'])}")
    if name in DIFFERENCES:
        worst = check_differences(settings, train, tensors, stream)
        print(f"  finite differences: {worst:.1e}")
        return worst < 1e-5
    return True


DIFFERENCES = {"documents", "jamba", "inner_all_three", "sigmoid_bias"}


def main():
    torch.set_num_threads(1)
    search = "--search" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--search"] or list(CASES)
    FIXTURES.mkdir(exist_ok=True)
    print(f"PyTorch {torch.__version__}")
    failed = [name for name in names if not make(name, search)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
