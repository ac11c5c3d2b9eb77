"""Independent reference of moemamba's language models, in plain PyTorch.

Written from the equations of the papers (docs/models.md), not from the C++: it exists to prove that
the C++ computes the same. Clarity before speed: the scan is a loop over time, experts are a loop
over experts, and gradients come from autograd. A model is a dictionary of named tensors and a
dictionary of settings; both use the names of moemamba's weight files and of ModelConfig.
"""

import math
import struct

import torch
import torch.nn.functional as F

MODEL_DEFAULTS = dict(
    vocabulary=0, width=192, blocks=4, pattern=[], norm="LAYER_NORM", norm_place="PRE",
    norm_eps=1e-5, final_norm=False,
    expand=2.0, state=16, conv=4, dt_rank=0, mamba_norms=False,
    experts=8, top_k=1, expert_hidden=0, expert_activation="RELU", capacity_factor=0.0,
    renormalise=False, balance_loss=0.01, z_loss=0.0, router="SOFTMAX", router_bias_rate=0.0,
    routed_scale=1.0, shared_hidden=0,
    projections=[], projection_experts="BOTTLENECK", projection_hidden=352,
    heads=4, kv_heads=0, head_width=0, attention_bias=False, positions="NONE", rope_base=10000.0,
    feed_forward_hidden=0, feed_forward_activation="RELU", feed_forward_bias=True,
    reset_at_documents=False)

TRAIN_DEFAULTS = dict(
    steps=20, global_batch_size=2, micro_batch_size=0, routing_group=1, sequence_length=12,
    lr=1e-2, final_lr_fraction=0.1, warmup_steps=3, beta1=0.9, beta2=0.999, adam_eps=1e-8,
    weight_decay=0.1, grad_clip=0.5)

# Settings that the configuration keeps in single precision.
SINGLE = {"norm_eps", "capacity_factor", "balance_loss", "z_loss", "router_bias_rate",
          "routed_scale", "lr", "final_lr_fraction", "beta1", "beta2", "adam_eps", "weight_decay",
          "grad_clip"}

END_OF_DOCUMENT = 0


def single(x):
    """x rounded to single precision."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


class Settings:
    """Settings with defaults filled in: `Settings(MODEL_DEFAULTS, width=16).width`."""

    def __init__(self, defaults, **given):
        unknown = set(given) - set(defaults)
        if unknown:
            raise ValueError(f"unknown settings: {sorted(unknown)}")
        for name, value in {**defaults, **given}.items():
            setattr(self, name, single(value) if name in SINGLE else value)

    # Sizes that follow from other settings.
    @property
    def inner(self):
        return int(self.expand * self.width)

    @property
    def rank(self):
        return self.dt_rank or math.ceil(self.width / 16)

    @property
    def key_heads(self):
        return self.kv_heads or self.heads

    @property
    def head(self):
        return self.head_width or self.width // self.heads

    @property
    def hidden(self):
        return self.feed_forward_hidden or 4 * self.width

    @property
    def expert_width(self):
        return self.expert_hidden or 3 * self.width

    def layers(self, block):
        """Layers of a block: a list of sub-layers, each a list of kinds that share a norm."""
        patterns = self.pattern or ["mamba, moe"]
        pattern = patterns[block % len(patterns)]
        return [[kind.strip() for kind in part.split("+")] for part in pattern.split(",")]


def norm_name(block, kinds):
    """Name of the norm of a sub-layer."""
    if len(kinds) > 1:
        return f"blocks.{block}.norm"
    kind = "mamba" if kinds[0] == "inner_moe" else kinds[0]
    return f"blocks.{block}.{kind}_norm"


# ---------------------------------------------------------------------------------------- shapes


def shapes(c, sequence_length):
    """Name -> shape of every tensor of a model, the router's biases (no weights) included."""
    out = {}

    def norm(name):
        out[name + ".weight"] = [c.width]
        if c.norm == "LAYER_NORM":
            out[name + ".bias"] = [c.width]

    def linear(name, rows, columns, bias=False):
        out[name + ".weight"] = [rows, columns]
        if bias:
            out[name + ".bias"] = [rows]

    def router(name, columns):
        linear(name, c.experts, columns, bias=c.router_bias_rate > 0)

    def feed_forward(name, hidden, activation, bias):
        linear(name + ".up", hidden, c.width, bias)
        if activation == "SWIGLU":
            linear(name + ".gate", hidden, c.width, bias)
        linear(name + ".down", c.width, hidden, bias)

    def projection(name, kind, rows, columns):
        if kind not in c.projections:
            linear(name, rows, columns)
            return
        if c.projection_experts == "BOTTLENECK":
            router(name + ".router", columns)
        for e in range(c.experts):
            if c.projection_experts == "BOTTLENECK":
                linear(f"{name}.experts.{e}.up", c.projection_hidden, columns)
                linear(f"{name}.experts.{e}.down", rows, c.projection_hidden)
            else:
                linear(f"{name}.experts.{e}", rows, columns)

    def mamba(name, inner_moe):
        if inner_moe:
            if c.projection_experts == "LINEAR":
                router(name + ".router", c.width)
            projection(name + ".conv_proj", "CONV", c.inner, c.width)
            projection(name + ".gate_proj", "GATE", c.inner, c.width)
            projection(name + ".out_proj", "OUTPUT", c.width, c.inner)
        else:
            linear(name + ".in_proj", 2 * c.inner, c.width)
            linear(name + ".out_proj", c.width, c.inner)
        out[name + ".conv1d.weight"] = [c.inner, c.conv]
        out[name + ".conv1d.bias"] = [c.inner]
        linear(name + ".x_proj", c.rank + 2 * c.state, c.inner)
        linear(name + ".dt_proj", c.inner, c.rank, bias=True)
        out[name + ".A_log"] = [c.inner, c.state]
        out[name + ".D"] = [c.inner]
        if c.mamba_norms:
            out[name + ".dt_norm.weight"] = [c.rank]
            out[name + ".b_norm.weight"] = [c.state]
            out[name + ".c_norm.weight"] = [c.state]

    def attention(name):
        rows = (c.heads + 2 * c.key_heads) * c.head
        linear(name + ".qkv_proj", rows, c.width, c.attention_bias)
        linear(name + ".out_proj", c.width, c.heads * c.head, c.attention_bias)

    def moe(name):
        router(name + ".router", c.width)
        for e in range(c.experts):
            feed_forward(f"{name}.experts.{e}", c.expert_width, c.expert_activation, False)
        if c.shared_hidden:
            feed_forward(name + ".shared", c.shared_hidden, c.expert_activation, False)

    linear("embedding", c.vocabulary, c.width)
    if c.positions == "LEARNED":
        linear("embedding.positions", sequence_length, c.width)
    for block in range(c.blocks):
        for kinds in c.layers(block):
            norm(norm_name(block, kinds))
            for kind in kinds:
                if kind in ("mamba", "inner_moe"):
                    mamba(f"blocks.{block}.mamba", kind == "inner_moe")
                elif kind == "attention":
                    attention(f"blocks.{block}.attention")
                elif kind == "feed_forward":
                    feed_forward(f"blocks.{block}.feed_forward", c.hidden,
                                 c.feed_forward_activation, c.feed_forward_bias)
                elif kind == "moe":
                    moe(f"blocks.{block}.moe")
                else:
                    raise ValueError(f"unknown layer {kind}")
    if c.final_norm:
        norm("final.norm")
    linear("head", c.vocabulary, c.width)
    return out


def is_state(name):
    """Whether a tensor is state (a router's bias): no gradient, not the optimizer's."""
    return name.endswith("router.bias")


# ---------------------------------------------------------------------------------------- router


class Routing:
    """The decisions of one router for one batch, and what they cost.

    experts [T, K] in order of choice, weights [T, K] (0 where dropped), kept [T, K], margins [T],
    counts [E] of the whole batch before dropping; balance and z, each a mean over the groups.
    """

    def __init__(self, c, logits, bias, group_tokens):
        tokens, count = logits.shape
        score = torch.softmax(logits, 1) if c.router == "SOFTMAX" else torch.sigmoid(logits)

        # The choice is a constant; equal values go to the lower id.
        chosen_on = (logits if bias is None else score + bias).detach()
        values, order = torch.sort(chosen_on, dim=1, descending=True, stable=True)
        self.experts = order[:, :c.top_k]
        deciding = values[:, :c.top_k + 1]
        gaps = deciding[:, :-1] - deciding[:, 1:]
        self.margins = (gaps.min(1).values if gaps.shape[1]
                        else torch.full_like(values[:, 0], math.inf))

        # Rows that find a place: first come, first served within each routing group.
        self.kept = torch.ones(tokens, c.top_k, dtype=torch.bool)
        if c.capacity_factor > 0:
            capacity = math.floor(c.capacity_factor * group_tokens * c.top_k / count)
            for start in range(0, tokens, group_tokens):
                taken = [0] * count
                for t in range(start, start + group_tokens):
                    for k in range(c.top_k):
                        e = int(self.experts[t, k])
                        self.kept[t, k] = taken[e] < capacity
                        taken[e] += 1

        weights = score.gather(1, self.experts)
        if c.renormalise:
            weights = weights / weights.sum(1, keepdim=True)
        self.weights = weights * c.routed_scale * self.kept

        # Balance loss (Switch Transformer) and z-loss, group by group.
        share = score if c.router == "SOFTMAX" else score / score.sum(1, keepdim=True)
        visits = F.one_hot(self.experts, count).sum(1)
        self.counts = visits.sum(0)
        balance, z = [], []
        for start in range(0, tokens, group_tokens):
            group = slice(start, start + group_tokens)
            load = visits[group].sum(0).to(score.dtype) / (group_tokens * c.top_k)
            balance.append(count * (share[group].mean(0) * load).sum())
            z.append((torch.logsumexp(logits[group], 1) ** 2).mean())
        self.balance = torch.stack(balance).mean()
        self.z = torch.stack(z).mean()

    def mix(self, x, expert, width, weighted=True):
        """sum over k of weight(t, k) * expert(e(t, k), x_t), dropped rows left out."""
        out = x.new_zeros(x.shape[0], width)
        for e in range(len(self.counts)):
            t, k = ((self.experts == e) & self.kept).nonzero(as_tuple=True)
            y = expert(e, x[t])
            out = out.index_add(0, t, y * self.weights[t, k, None] if weighted else y)
        return out


# ----------------------------------------------------------------------------------------- model


class Model:
    """A language model: `loss(inputs, targets, starts)` of one batch.

    tensors: name -> tensor. group: sequences of a routing group. After a call, `routings` has the
    routers' decisions in the order of the model and `kink` the smallest nonzero |input| of a ReLU.
    """

    def __init__(self, settings, tensors, group):
        self.c = settings
        self.tensors = tensors
        self.group = group

    def __getitem__(self, name):
        return self.tensors[name]

    # Parts.

    def linear(self, name, x):
        y = x @ self[name + ".weight"].T
        return y + self[name + ".bias"] if name + ".bias" in self.tensors else y

    def norm(self, name, x):
        if self.c.norm == "RMS_NORM":
            return self.rms_norm(name, x)
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred ** 2).mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(variance + self.c.norm_eps)
        return scaled * self[name + ".weight"] + self[name + ".bias"]

    def rms_norm(self, name, x):
        square = (x ** 2).mean(-1, keepdim=True)
        return x / torch.sqrt(square + self.c.norm_eps) * self[name + ".weight"]

    def relu(self, x):
        size = x.detach().abs()
        size = size[size > 0]
        if len(size):
            self.kink = min(self.kink, float(size.min()))
        return torch.relu(x)

    def feed_forward(self, name, x, activation):
        up = self.linear(name + ".up", x)
        if activation == "SWIGLU":
            hidden = F.silu(self.linear(name + ".gate", x)) * up
        elif activation == "GELU":
            hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        elif activation == "SILU":
            hidden = F.silu(up)
        else:
            hidden = self.relu(up)
        return self.linear(name + ".down", hidden)

    def route(self, name, x):
        """Decisions of the router `name` on x [T, width]."""
        logits = x @ self[name + ".weight"].T
        routing = Routing(self.c, logits, self.tensors.get(name + ".bias"),
                          self.group * self.length)
        self.routings.append((name, routing))
        return routing

    # Layers: x [B, L, width] -> [B, L, width].

    def moe(self, name, x):
        flat = x.reshape(-1, self.c.width)
        routing = self.route(name + ".router", flat)

        def expert(e, rows):
            return self.feed_forward(f"{name}.experts.{e}", rows, self.c.expert_activation)

        out = routing.mix(flat, expert, self.c.width)
        if self.c.shared_hidden:
            out = out + self.feed_forward(name + ".shared", flat, self.c.expert_activation)
        return out.reshape(x.shape)

    def attention(self, name, x):
        c = self.c
        batch, length, _ = x.shape
        qkv = self.linear(name + ".qkv_proj", x)
        q, k, v = qkv.split([c.heads * c.head, c.key_heads * c.head, c.key_heads * c.head], -1)
        q = q.reshape(batch, length, c.heads, c.head)
        k = k.reshape(batch, length, c.key_heads, c.head)
        v = v.reshape(batch, length, c.key_heads, c.head)
        if c.positions == "ROPE":
            q, k = self.turn(q), self.turn(k)
        # Query head h reads key head h // (heads / key_heads).
        k = k.repeat_interleave(c.heads // c.key_heads, 2)
        v = v.repeat_interleave(c.heads // c.key_heads, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(c.head)
        place = torch.arange(length)
        seen = (place[None, :] <= place[:, None])[None]
        seen = seen & (self.document[:, :, None] == self.document[:, None, :])
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        out = torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)
        return self.linear(name + ".out_proj", out.reshape(batch, length, c.heads * c.head))

    def turn(self, x):
        """Rotary positions on x [B, L, heads, head]: pairs (i, i + head / 2)."""
        half = self.c.head // 2
        i = torch.arange(half, dtype=torch.float64)
        angle = self.place[:, :, None, None] * self.c.rope_base ** (-2 * i / self.c.head)
        cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def mamba(self, name, x):
        xz = self.linear(name + ".in_proj", x)
        gated = self.scan_path(name, xz[..., :self.c.inner], xz[..., self.c.inner:])
        return self.linear(name + ".out_proj", gated)

    def inner_moe(self, name, x):
        """A Mamba layer whose chosen projections consist of experts."""
        c = self.c
        shared = None
        if c.projection_experts == "LINEAR" and c.projections:
            shared = self.route(name + ".router", x.reshape(-1, c.width))

        def project(part, kind, y, width):
            part = f"{name}.{part}"
            if kind not in c.projections:
                return self.linear(part, y)
            flat = y.reshape(-1, y.shape[-1])
            if c.projection_experts == "LINEAR":
                out = shared.mix(flat, lambda e, rows: self.linear(f"{part}.experts.{e}", rows),
                                 width, weighted=kind == "OUTPUT")
            else:
                routing = self.route(part + ".router", flat)
                out = routing.mix(flat, lambda e, rows: self.feed_forward(
                    f"{part}.experts.{e}", rows, "RELU"), width)
            return out.reshape(*y.shape[:-1], width)

        conv_input = project("conv_proj", "CONV", x, c.inner)
        gate = project("gate_proj", "GATE", x, c.inner)
        gated = self.scan_path(name, conv_input, gate)
        return project("out_proj", "OUTPUT", gated, c.width)

    def scan_path(self, name, x, z):
        """Convolution, selective scan and gate: what stands between a Mamba layer's projections."""
        c = self.c
        batch, length, inner = x.shape

        # Causal depthwise convolution; its last tap is the current token's. It does not look
        # across the start of a document.
        conv = self[name + ".conv1d.bias"].expand(batch, length, inner)
        for tap in range(c.conv):
            back = c.conv - 1 - tap
            if back >= length:
                continue
            past = x[:, :length - back]
            same = self.document[:, :length - back] == self.document[:, back:]
            past = torch.where(same[..., None], past, torch.zeros_like(past))
            past = torch.cat([x.new_zeros(batch, back, inner), past], 1)
            conv = conv + self[name + ".conv1d.weight"][:, tap] * past
        u = F.silu(conv)

        dt, b, out_c = self.linear(name + ".x_proj", u).split([c.rank, c.state, c.state], -1)
        if c.mamba_norms:
            dt = self.rms_norm(name + ".dt_norm", dt)
            b = self.rms_norm(name + ".b_norm", b)
            out_c = self.rms_norm(name + ".c_norm", out_c)
        delta = F.softplus(self.linear(name + ".dt_proj", dt))  # x where x > 20
        a = -torch.exp(self[name + ".A_log"])

        h = x.new_zeros(batch, inner, c.state)
        ys = []
        for t in range(length):
            if t > 0:
                goes_on = self.document[:, t] == self.document[:, t - 1]
                h = torch.where(goes_on[:, None, None], h, torch.zeros_like(h))
            step = delta[:, t, :, None]
            h = torch.exp(step * a) * h + step * b[:, t, None, :] * u[:, t, :, None]
            ys.append((h * out_c[:, t, None, :]).sum(-1))
        y = torch.stack(ys, 1) + self[name + ".D"] * u
        return y * F.silu(z)

    # The whole.

    def logits(self, inputs, starts):
        """inputs [B, L] token ids; starts [B, L]: whether a token is the first of a document."""
        c = self.c
        _, self.length = inputs.shape
        self.routings = []
        self.kink = math.inf

        # Number of each token's document, and the token's place in it.
        place = torch.arange(self.length).expand(inputs.shape)
        if c.reset_at_documents:
            self.document = starts.long().cumsum(1)
            first = torch.where(starts, place, torch.zeros_like(place)).cummax(1).values
            self.place = place - first
        else:
            self.document = torch.zeros_like(inputs)
            self.place = place

        s = self["embedding.weight"][inputs]
        if c.positions == "LEARNED":
            s = s + self["embedding.positions.weight"]
        for block in range(c.blocks):
            for kinds in c.layers(block):
                norm = norm_name(block, kinds)
                n = self.norm(norm, s) if c.norm_place == "PRE" else s
                for kind in kinds:
                    part = "mamba" if kind == "inner_moe" else kind
                    y = (self.feed_forward(f"blocks.{block}.feed_forward", n,
                                           c.feed_forward_activation) if kind == "feed_forward"
                         else getattr(self, kind)(f"blocks.{block}.{part}", n))
                    s = s + y
                if c.norm_place == "POST":
                    s = self.norm(norm, s)
        if c.final_norm:
            s = self.norm("final.norm", s)
        return s @ self["head.weight"].T

    def loss(self, inputs, targets, starts):
        """(whole loss, cross-entropy, balance term) of a batch."""
        logits = self.logits(inputs, starts)
        ce = F.cross_entropy(logits.reshape(-1, self.c.vocabulary), targets.reshape(-1))
        if not self.routings:
            return ce, ce, torch.zeros_like(ce)
        balance = torch.stack([r.balance for _, r in self.routings]).mean() * self.c.balance_loss
        z = torch.stack([r.z for _, r in self.routings]).mean() * self.c.z_loss
        return ce + balance + z, ce, balance


# -------------------------------------------------------------------------------------- training


def batch_of(stream, step, train):
    """(inputs, targets, starts), each [B, L], of a step (0, 1, ...) of a stream of token ids."""
    size = train.global_batch_size * train.sequence_length
    start = step * size
    shape = (train.global_batch_size, train.sequence_length)
    inputs = torch.tensor(stream[start:start + size]).reshape(shape)
    targets = torch.tensor(stream[start + 1:start + size + 1]).reshape(shape)
    starts = torch.tensor([i == 0 or stream[i - 1] == END_OF_DOCUMENT
                           for i in range(start, start + size)]).reshape(shape)
    return inputs, targets, starts


def learning_rate(train, step):
    """Linear warm-up, then a cosine down to final_lr_fraction of the highest rate."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps))
    low = train.final_lr_fraction
    return train.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def run(settings, train, tensors, stream, dtype, steps=None, watch=None):
    """Trains from `tensors` (left as they are); returns the loss before each step's update.

    watch(step, model, losses): called after each backward pass, with unclipped gradients.
    """
    own = {name: tensor.to(dtype).clone().requires_grad_(not is_state(name))
           for name, tensor in tensors.items()}
    weights = [tensor for name, tensor in own.items() if not is_state(name)]
    model = Model(settings, own, train.routing_group)
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(train.beta1, train.beta2),
                                  eps=train.adam_eps, weight_decay=train.weight_decay)
    losses = []
    for step in range(train.steps if steps is None else steps):
        optimizer.zero_grad()
        parts = model.loss(*batch_of(stream, step, train))
        parts[0].backward()
        for weight in weights:  # AdamW passes over a weight without gradient; zero still decays
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        losses.append(float(parts[0].detach()))
        if watch:
            watch(step, model, [float(part.detach()) for part in parts])
        if train.grad_clip > 0:
            norm = torch.sqrt(sum((weight.grad ** 2).sum() for weight in weights))
            if norm > train.grad_clip:
                for weight in weights:
                    weight.grad *= train.grad_clip / norm
        optimizer.param_groups[0]["lr"] = learning_rate(train, step)
        optimizer.step()
        for name, routing in model.routings:  # the bias follows the load of the whole batch
            if settings.router_bias_rate > 0:
                counts = routing.counts
                ahead = counts.sum() - counts * len(counts)  # E * (mean - count), in integers
                own[name + ".bias"] += settings.router_bias_rate * torch.sign(ahead)
    return losses
