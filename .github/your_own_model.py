"""GRPO and StableDRL in a trainer of your own, for a model with full attention such as LLaDA: its
whole completion is one block. Processes and micro-batches may cut the groups in any way.

If you hold the model that wrote the completions, call `learn` with grpo_loss and clip_eps=0.2: the
masks are then shared. If the old estimates come from elsewhere, without their masks, call
`training_step` with micro-batches from `with_masks`, stabledrl_loss and clip_eps=1.

Copy this file beside stabledrl.py and toy_tasks/. Or copy it into your program together with
`group_advantages`, the loss that you use, and their helpers `check_batch` and `safe_exp`: they need
torch and math.

N completions are in the batch, n of them on this process, and k in a micro-batch of it. Row r of
the batch belongs to group r // group_size. Filler is what makes texts equally long, on either side.
Names and shapes:
  tokens         (k, S)  long: prompt, completion and filler
  is_completion  (k, S)  bool: all that the sampler wrote, end-of-text tokens included, no filler. (If
                         you cut behind the first end-of-text token, the estimate is that of a model
                         which is told the length.)
  hidden         (k, S)  bool, True where the model sees [MASK]
  micro_batches          list of (tokens, is_completion), in `training_step` with hidden as a third;
                         S may differ between them
  rows, rewards  (n,)    the number 0..N−1 of each completion on this process, in the order of the
                         micro-batches, and its reward as it is, not normalised. If each process
                         holds whole groups, rows are torch.arange(n) + rank·n
  model                  torch.nn.Module, tokens (k,S) -> logits (k,S,vocab), −inf for [MASK]. It
                         must not look at filler: wrap yours if it takes an attention mask. (Filler
                         needs an id of its own, other than that of end-of-text.)

What nothing here checks:
  * The sampler writes one token at a time, in random order over the whole completion, at
    temperature 1, without top-p, with the current weights, and with the same logits as here.
  * mask_id is right. (A wrong one trains, badly.)
  * All completions of a group have the same prompt.
  * All processes have the same weights, and at least one completion. Seed them differently, but
    after the model is made: otherwise all draw the same masks.
  * Weights that Adam changes are float32: bfloat16 rounds most small updates away.
  * Autocast stands inside the model's forward, not around these functions. (They run it without
    gradient first, and in torch 2.13 some layers then get no gradient at all.)
  * With shared masks the log-ratios of the first update, which `learn` returns, are 0. If they are
    not, the model's forward is random, or not the same twice. But 0 proves nothing else.
  * Not tried: FSDP, gradient scalers. Gradients that a parameter has before the call are deleted.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stabledrl import group_advantages


def hide(is_completion):
    """(k,S) bool -> (k,S) bool, True = hidden: in each row m random tokens of the completion, with
    m uniform on 1 .. its length."""
    length = is_completion.sum(-1, keepdim=True)  # (k, 1)
    assert length.all(), "a row has no completion"
    m = (torch.rand(length.shape, device=length.device) * length).long() + 1  # (k, 1)
    uniform = torch.rand(is_completion.shape, device=length.device)  # (k, S)
    rank = uniform.masked_fill(~is_completion, 2).argsort(-1).argsort(-1)  # all else comes last
    return rank < m


def estimate(model, tokens, is_completion, hidden, mask_id):
    """log π̂ in nats (k,), the ELBO by one noisy copy: length/m · Σ_hidden log p. It is a sum: the
    ratio of a mean over tokens would be ρ̂^(1/length)."""
    # Dropout would be one more noise in the ratio. (Some libraries checkpoint gradients in training
    # mode only. For them set every dropout to 0, and leave this line out.)
    assert not any(module.training for module in model.modules()), "call model.eval() first"
    assert not (is_completion & (tokens == mask_id)).any(), "a completion has a place still masked"
    logits = model(torch.where(hidden, mask_id, tokens))  # (k, S, vocab)
    # Softmax and sum in float32: between 128 and 256 bfloat16 has whole numbers only. At −150 nats
    # rounding to them would alone give the difference of two estimates a noise of 0.4 nats.
    log_p = -F.cross_entropy(logits.float().mT, tokens, reduction="none")  # (k, S)
    log_p = log_p.masked_fill(~hidden, 0)  # not a product: 0 · −inf is NaN
    return is_completion.sum(-1) / hidden.sum(-1) * log_p.sum(-1)


@torch.no_grad()
def log_probs(model, micro_batches, mask_id):
    """log π̂ (n,) of all completions on this process, without gradient."""
    return torch.cat([estimate(model, *piece, mask_id) for piece in micro_batches])


def with_masks(micro_batches):
    """list of (tokens, is_completion, ..) -> list of (tokens, is_completion, fresh masks)."""
    return [(piece[0], piece[1], hide(piece[1])) for piece in micro_batches]


def noise(model, micro_batches, mask_id):
    """σ in nats, to be measured before you train: the standard deviation, over completions, of the
    difference of two estimates with masks of their own. Both are of one policy, so each true ratio
    is 1. Take some hundred completions, or repeat it: the tail is heavy. And look again later: σ
    changes while you train."""
    first = log_probs(model, with_masks(micro_batches), mask_id)  # (n,)
    return (first - log_probs(model, with_masks(micro_batches), mask_id)).std()


def whole_batch(rows, log_ratio, rewards, group_size):
    """(n,) each, of this process -> log_ratio and rewards (N,) of all processes, in the order of
    the rows, float64, on the CPU. All processes see the same numbers. So all of them raise an error
    here, or none does, and none is left waiting for another."""
    table = torch.stack([x.cpu().double() for x in (rows, log_ratio, rewards)])  # (3, n)
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, table)  # n may differ between processes
        table = torch.cat(parts, dim=1)  # (3, N)
    rows, log_ratio, rewards = table[:, table[0].argsort()]
    if len(rows) % group_size or rows.tolist() != list(range(len(rows))):
        raise ValueError(f"not whole groups of {group_size} with each row once: {rows.tolist()}")
    # Never replace a NaN by 0: as a log π̂, beside others of −150, this gives the largest ratio.
    bad = ~(log_ratio + rewards).isfinite()
    if bad.any():
        raise FloatingPointError(f"log-ratio or reward of rows {bad.nonzero().flatten().tolist()}")
    return log_ratio, rewards


def training_step(
    model,
    optimizer,
    micro_batches,
    old_log_prob,
    rows,
    rewards,
    group_size,
    mask_id,
    loss,
    clip_eps,
    max_grad_norm=1.0,
):
    """One update, with the gradient of the whole batch -> log ρ̂ (N,), and the norm of the gradient
    before it is clipped. old_log_prob (n,): see `learn`. loss and clip_eps: grpo_loss and 0.2 if
    masks are shared, else stabledrl_loss and 1, or 0 for no ratio (see README's table). ValueError
    for rows that are held twice or missing (of a missing last group nobody knows),
    FloatingPointError for numbers that are not finite: the update is not made then."""
    # (1) A loss needs whole groups, but only one number of each completion. So compute them all
    # without gradient, and gather them.
    log_ratio = log_probs(model, micro_batches, mask_id) - old_log_prob  # (n,)
    log_ratio, rewards = whole_batch(rows, log_ratio, rewards, group_size)  # (N,)
    advantages = group_advantages(rewards, group_size)  # (N,)

    # (2) By the chain rule, the gradient of the loss is Σ_j c_j·g_j: g_j is the gradient of the
    # estimate of completion j, and c_j that of the loss with respect to log ρ̂_j.
    leaf = log_ratio.requires_grad_()
    coefficients = torch.autograd.grad(loss(leaf, advantages, clip_eps, group_size), leaf)[0]
    coefficients = coefficients[rows.cpu()].to(old_log_prob)  # (n,), on its device, in its dtype

    # (3) Now each completion can go its own way: micro-batch by micro-batch, with the same masks.
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)  # not None, so that all processes sum the same tensors
    sizes = [len(piece[0]) for piece in micro_batches]
    for c, piece in zip(coefficients.split(sizes), micro_batches):
        (c * estimate(model, *piece, mask_id)).sum().backward()

    # (4) Sum over the processes. (`model` is the bare model: for one that is wrapped in DDP,
    # pass model.module.)
    if dist.is_initialized():
        for p in parameters:
            dist.all_reduce(p.grad)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not grad_norm.isfinite():
        raise FloatingPointError(f"the norm of the gradient is {grad_norm}")
    optimizer.step()
    return log_ratio.detach(), grad_norm


def learn(model, optimizer, micro_batches, mu, mask_id, shared_masks=True, **options):
    """μ updates on completions that the model has just written -> what `training_step` returns, μ
    times. micro_batches: list of (tokens, is_completion). options: rows, rewards, group_size, loss,
    clip_eps, max_grad_norm. Each update has masks of its own. If they are shared, old and new
    estimate of an update use the same ones, so there are μ old estimates, all made before the first
    update. If not, there is one, with other masks."""
    batches = [with_masks(micro_batches) for _ in range(mu)]
    if shared_masks:
        old_log_probs = [log_probs(model, batch, mask_id) for batch in batches]  # (n,) each
    else:
        old_log_probs = [log_probs(model, with_masks(micro_batches), mask_id)] * mu
    return [
        training_step(model, optimizer, batch, old_log_prob, mask_id=mask_id, **options)
        for batch, old_log_prob in zip(batches, old_log_probs)
    ]
