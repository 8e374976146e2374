"""StableDRL in one file: reinforcement learning for diffusion language models, in spite of the
noise that makes GRPO collapse.

Source: Zhong et al., Stabilizing Reinforcement Learning for Diffusion Language Models, arXiv
2603.06743. The README shows what happens; this file derives the method. The model is a
transformer that is shown a text with some tokens replaced by [MASK], and predicts them. It writes
by filling in [MASK]s: block after block from left to right, and within a block in random order.

How rewards train a model. (If you know GRPO, skip to "On a diffusion model".) As a distribution
over completions, the model is a *policy* π_θ with parameters θ. It completes each prompt G times;
these G completions are a *group*. A judge gives each completion a reward. Its *advantage* A is that
reward minus the mean of its group, divided by the standard deviation of the group. A completion is
*good* if A > 0, and *bad* if A < 0. The gradient of the expected reward is E[reward·∇log π_θ]. A
number that does not depend on the completion may be subtracted from the reward, since E[∇log π_θ]
is 0. So gradient ascent on Σ A·log π_θ(completion) raises the expected reward. This is REINFORCE.
(There are three reservations: see `group_advantages` in §5.)

That holds for completions which π_θ itself wrote. After one optimiser step (an *update*) π_θ is no
longer the policy that wrote them, π_old. To use them for μ updates, PPO and GRPO weight them by the
*importance ratio* ρ = π_θ/π_old: for any f, E_old[ρ·f] = E_θ[f]. So E_old[ρ·A·∇log π_θ] is the
gradient of the expected reward again. It is also the gradient of E_old[ρ·A], since ∇ρ = ρ·∇log π_θ.

On a diffusion model log π is *estimated*, with random numbers (§3). The ratio ρ̂ of two estimates
may be 100 or more where ρ is 1 (§4). GRPO clips such a ratio if the completion is good, but not if
it is bad (§5). StableDRL clips every ratio, and divides the ratios of a group by their sum.

The sections:
  §1 Transformer    what is the model?
  §2 Sampler        how does it write?
  §3 Estimate       how likely is what it wrote?
  §4 Noise          how wrong is that estimate?
  §5 Losses         what do GRPO and StableDRL do with it?
  §6 Training       how does it all run?
  §7 Command line   files, flags, processes, table and figure

Notation: symbol, name in the code, shape, meaning. A hat marks an estimate.
  q       prompts      (M, P)     M prompts of P tokens each; in the task of addition, "12+34="
  y       completions  (N, L)     N = M·G, of L tokens each, "46.." ("." pads it); rows i·G to
                                  i·G+G−1 are the group of prompt i
  B       block_size              tokens per block; P and L are multiples of B. B = 2: "46", ".."
  G       group_size              completions per prompt
  K       copies                  number of *noisy copies* per estimate: y with some tokens hidden
          masks        (N, K, L)  True where a copy shows [MASK] in place of its token. (`mask` is
                                  another thing, an attention mask: who may look at whom)
          steps        (N, L)     the step, 0..B−1 in its block, at which a token was written
  log π̂   log_prob     (N,)       estimate of log π(y|q), or of a lower bound on it, in nats
  log ρ̂   log_ratio    (N,)       log π̂_θ − log π̂_old: one number per completion
  A       advantages   (N,)       reward relative to the group
  ε       clip_eps                ratios are clipped to [1−ε, 1+ε]
  μ       mu                      updates that use one batch of completions
"""

import argparse
import collections
import copy
import ctypes
import dataclasses
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# A task makes prompts and judges completions, as strings; toy_tasks/__init__.py lists the details.
from toy_tasks import TASKS, decode, encode

# ==== §1  Transformer =============================================================================
# What is the model? An ordinary transformer that is told by an attention mask who may look at whom.
# Under a causal mask, and with targets shifted by one, it would be a GPT. Three details matter:
#   * Positions are an argument, so a noisy copy can use the positions of its original (§3).
#   * [MASK] can be an input but never a prediction: if the sampler wrote it, the place would still
#     be blank.
#   * `read` returns the keys and values of what it has read, the *cache*. A later `read` goes on
#     from there, so finished text is read once.
# Shapes: S tokens are read now, T is S plus the tokens in the cache; H heads have D features each.


def rotate(x, rotation):
    """Rotary position embedding (Su et al. 2021), (..,S,D) -> (..,S,D). Pairs of features are
    complex numbers; rotation (S,D/2) turns pair d by the angle position·10,000^(−2d/D)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (.., S, D/2)
    return torch.view_as_real(pairs * rotation).flatten(-2)


class Layer(nn.Module):
    """One layer of a pre-norm transformer: add what attention says, then what the MLP says."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(d_model, bias=False)
        self.norm2 = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x, rotation, mask, cache):
        """x (N,S,d_model), mask (S,T), cache (2,N,H,T−S,D) or None -> (N,S,d_model), and the keys
        and values of all T tokens, the new cache (2,N,H,T,D). The cache may also be of M prompts
        (2,M,H,T−S,D); each entry is then repeated for the N/M completions of its prompt."""
        qkv = self.qkv(self.norm1(x))  # (N, S, 3·d_model)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (N, S, 3, H, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, S, D)
        keys_values = torch.stack((rotate(key, rotation), value))  # (2, N, H, S, D)
        if cache is not None:
            samples = len(x) // cache.shape[1]  # N/M for a cache of prompts, else 1
            cache = cache.repeat_interleave(samples, dim=1)  # (2, N, H, T−S, D)
            keys_values = torch.cat((cache, keys_values), dim=3)  # (2, N, H, T, D)
        query = rotate(query, rotation)
        heads = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask)  # (N, H, S, D)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), keys_values


class BlockDiffusionTransformer(nn.Module):
    """Predicts every token at its own place (no shift by one) from whatever the mask lets it see. A
    visible token sees itself, so only predictions at [MASK] mean anything. vocab_size counts
    [MASK], the last id."""

    def __init__(self, vocab_size, d_model=64, n_layer=2, n_head=4):
        super().__init__()
        assert d_model % (2 * n_head) == 0, (  # `rotate` wants an even number of features per head
            f"d_model {d_model} is not a multiple of 2*{n_head} heads"
        )
        self.mask_id = vocab_size - 1
        self.head_dim = d_model // n_head
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size - 1, bias=False)  # no row for [MASK]
        nn.init.normal_(self.embed.weight, std=0.02)  # as GPT-2's embedding

    def forward(self, tokens, positions, mask):
        """tokens (N,S) long, positions (S,) long, mask (S,S) bool, True where the row may look at
        the column -> logits (N,S,vocab_size); that of [MASK] is −inf."""
        return self.read(tokens, positions, mask)[0]

    def read(self, tokens, positions, mask, cache=None):
        """Read tokens that follow a cached text -> logits (N,S,vocab_size), and the new cache, a
        list of one tensor per layer. mask (S,T); cache: what an earlier `read` returned, or None at
        the beginning of a text."""
        exponents = torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim
        angles = positions[:, None] * 10_000.0**-exponents  # (S, D/2)
        rotation = torch.exp(1j * angles)
        x = self.embed(tokens)  # (N, S, d_model)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(x, rotation, mask, cache[i] if cache else None)
            new_cache.append(keys_values)
        logits = self.head(self.norm(x))
        return F.pad(logits, (0, 1), value=-math.inf), new_cache  # −∞ for [MASK], the last id


def block_causal_mask(length, block_size, device=None):
    """(length, length) bool, True where the row may look at the column: its own block and all
    before it. Finished text is read under this mask. For length 4 and block_size 2 (# = True):
        # # . .
        # # . .
        # # # #
        # # # #
    """
    block = torch.arange(length, device=device) // block_size  # (length,)
    return block[:, None] >= block[None, :]


def check_lengths(block_size, *lengths):
    """AssertionError unless all are multiples of block_size. (P must be a multiple, too: attention
    masks count blocks from the first token of the prompt.)"""
    for length in lengths:
        assert length % block_size == 0, (
            f"lengths {lengths} must be multiples of block_size {block_size}"
        )


# ==== §2  Sampler =================================================================================
# How does it write? Block after block, left to right. A block begins as B [MASK]s. Each step reads
# the block, chooses one masked place, and writes a token there:
#   * *Where* is chosen at random (order="random").
#   * *What* is drawn from the model's prediction for that place.
# So π(block) is the mean over the B! orders of ∏ over the steps of p(the token that was written).
# RL trains this policy, and `reward` in a run's log.jsonl is its reward.
#
# Real models usually begin where they are most confident (order="confidence"), since their
# completions are then better. That is another policy: the order follows from θ, and changes while θ
# moves. Here it serves for evaluation, with the likeliest token at each place: see `evaluate`.
#
# For B = 2, brackets show what each `read` reads; the text before them is cached. _ is [MASK].
#     [12+34=]     12+34=[__]  12+34=[4_]  12+34=[46]     12+34=46[__]  12+34=46[_.]
# Reads 1 and 4 only fill the cache: a block is cached when it is finished, since until then each
# new token changes the keys and values of the block. (The last block is not: nothing follows it.)


@torch.no_grad()
def generate(
    model,
    prompts,
    completion_len,
    block_size,
    temperature=1.0,
    order="random",
    generator=None,
    samples=1,
    return_steps=False,
):
    """Complete prompts (M,P), each `samples` times -> (N,L) long, N = M·samples; with return_steps
    also the steps (N,L) long. Rows i·samples to (i+1)·samples−1 belong to prompt i. temperature
    divides the logits; 0 takes the likeliest token. (§3 and §4 are about temperature 1.)
    FloatingPointError for logits that are NaN or +∞."""
    prompts = torch.as_tensor(prompts)
    M, P = prompts.shape
    L, B, device = completion_len, block_size, prompts.device
    check_lengths(B, P, L)
    assert order in ("random", "confidence"), f"order is 'random' or 'confidence', not {order!r}"
    assert 0 <= temperature < math.inf, f"temperature is at least 0 and finite, not {temperature}"
    positions = torch.arange(P + L, device=device)
    mask = block_causal_mask(P + L, B, device)  # (P + L, P + L)

    completions = prompts.new_full((M * samples, L), model.mask_id)  # (N, L)
    steps = torch.zeros_like(completions)
    _, cache = model.read(prompts, positions[:P], mask[:P, :P])
    for begin in range(P, P + L, B):
        end = begin + B
        block_positions = positions[begin:end]
        block_mask = mask[begin:end, :end]  # a block sees itself and all before it
        columns = slice(begin - P, end - P)
        block = completions[:, columns]  # (N, B), a view: writing here writes there
        # For a random order each place draws a number. The place with the largest comes first.
        uniform = torch.rand(block.shape, generator=generator, device=device)
        for step in range(B):
            logits, _ = model.read(block, block_positions, block_mask, cache)  # (N, B, vocab)
            priority = uniform if order == "random" else logits.softmax(-1).amax(-1)  # (N, B)
            priority = priority.masked_fill(block != model.mask_id, -1)  # written: never chosen
            place = priority.argmax(-1, keepdim=True)  # (N, 1)
            logits = logits.take_along_dim(place[:, :, None], dim=1)  # (N, 1, vocab)
            logits = logits[:, 0]  # (N, vocab)
            if not logits.logsumexp(-1).isfinite().all():  # the one −∞ of [MASK] does no harm
                raise FloatingPointError("the model's logits are not finite")
            token = logits.argmax(-1, keepdim=True)  # (N, 1)
            if temperature > 0:
                p = (logits / temperature).softmax(-1)  # (N, vocab)
                token = torch.multinomial(p, 1, generator=generator)
            block.scatter_(1, place, token)
            steps[:, columns].scatter_(1, place, step)
        if end < P + L:  # after the last block nothing is read
            _, cache = model.read(block, block_positions, block_mask, cache)
    return (completions, steps) if return_steps else completions


# ==== §3  Estimate ================================================================================
# How likely is what it wrote? Hide tokens, and ask for them. In every block draw a count m
# uniformly from 1..B, and put [MASK] in place of m random tokens. (This is the *forward process* of
# diffusion: it destroys a text.) The log-probabilities that the model gives to these tokens, times
# B/m and summed, estimate a lower bound on log π(completion): see `elbo`. Pretraining maximises
# this estimate, and RL uses it as log π̂.
#
# One pass scores all blocks. Each block must be predicted from the true text before it, without
# seeing its own hidden tokens. So the model reads the completion clean (nothing hidden) and, beside
# it, K noisy copies, each with its own hidden tokens. The *staircase* mask says who may look at
# whom: a noisy token at its own noisy block, and at clean blocks *strictly before* its own.
# Predictions are taken at the noisy copies.


def sample_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, on the generator's device, True where a token is hidden: in each block m random
    places, with m uniform on 1..B."""
    check_lengths(block_size, completion_len)
    shape, device = (num_seqs, copies, completion_len // block_size), generator.device
    m = torch.randint(1, block_size + 1, (*shape, 1), generator=generator, device=device)
    uniform = torch.rand(*shape, block_size, generator=generator, device=device)  # (N, K, L/B, B)
    rank = uniform.argsort(-1).argsort(-1)  # argsort twice gives ranks: .7 .1 .4 -> 2 0 1
    return (rank < m).flatten(-2)  # (N, K, L)


def staircase_positions(prompt_len, completion_len, copies=1, device=None):
    """(T,) long, T = P + L + K·L. Noisy copies reuse the positions P..P+L−1 of the completion: a
    token is predicted where the sampler wrote it."""
    clean = torch.arange(prompt_len + completion_len, device=device)  # (P + L,)
    return torch.cat((clean, clean[prompt_len:].repeat(copies)))


def staircase_mask(prompt_len, completion_len, block_size, copies=1, device=None):
    """(T,T) bool, True = the row may look at the column, for [prompt | clean completion | noisy
    copy 1 | .. | noisy copy K], T = P + L + K·L. Source: the paper's staircase attention, which is
    BD3-LM's mask (Arriola et al. 2025) with a prompt that is never noisy. Clean text, the prompt
    included, is under the block-causal mask. For P = 4, L = 4, B = 2, K = 2:
                  prompt    clean     copy 1    copy 2
        prompt    # # . .   . . . .   . . . .   . . . .
                  # # . .   . . . .   . . . .   . . . .
                  # # # #   . . . .   . . . .   . . . .
                  # # # #   . . . .   . . . .   . . . .
        clean     # # # #   # # . .   . . . .   . . . .
                  # # # #   # # . .   . . . .   . . . .
                  # # # #   # # # #   . . . .   . . . .
                  # # # #   # # # #   . . . .   . . . .
        copy 1    # # # #   . . . .   # # . .   . . . .
                  # # # #   . . . .   # # . .   . . . .
                  # # # #   # # . .   . . # #   . . . .
                  # # # #   # # . .   . . # #   . . . .
        copy 2    # # # #   . . . .   . . . .   # # . .
                  # # # #   . . . .   . . . .   # # . .
                  # # # #   # # . .   . . . .   . . # #
                  # # # #   # # . .   . . . .   . . # #
    """
    P, L = prompt_len, completion_len
    check_lengths(block_size, P, L)
    block = staircase_positions(P, L, copies, device) // block_size  # (T,) 0, 1, ..
    copy_of = torch.arange(copies + 1, device=device).repeat_interleave(L)  # (L + K·L,)
    copy_of = F.pad(copy_of, (P, 0))  # (T,) k in noisy copy k, 0 in prompt and clean completion
    from_block, to_block = block[:, None], block[None, :]
    from_copy, to_copy = copy_of[:, None], copy_of[None, :]
    clean_to_clean = (from_copy == 0) & (to_copy == 0) & (from_block >= to_block)
    noisy_to_clean = (from_copy > 0) & (to_copy == 0) & (from_block > to_block)  # >= would leak
    noisy_to_own_block = (from_copy > 0) & (from_copy == to_copy) & (from_block == to_block)
    return clean_to_clean | noisy_to_clean | noisy_to_own_block


def token_log_probs(model, prompts, completions, block_size, masks):
    """log p(y_i | its noisy block, the clean text before it) at every place i of every copy:
    prompts (M,P), completions (N,L), masks (N,K,L) bool -> (N,K,L). Where y_i is visible the value
    means nothing: callers must leave it out.

    Each prompt is read once for all of its N/M completions, under the prompt's part of
    `staircase_mask` (P × P). Then one pass reads [completion | K noisy copies], under the
    remaining rows of that mask."""
    (N, K, L), P = masks.shape, prompts.shape[1]
    mask = staircase_mask(P, L, block_size, K, prompts.device)  # (T, T), T = P + L + K·L
    positions = staircase_positions(P, L, K, prompts.device)  # (T,)
    noisy = torch.where(masks, model.mask_id, completions[:, None])  # (N, K, L)
    tokens = torch.cat((completions, noisy.flatten(1)), dim=1)  # (N, L + K·L)
    _, cache = model.read(prompts, positions[:P], mask[:P, :P])  # gradients flow through it
    logits, _ = model.read(tokens, positions[P:], mask[P:], cache)  # (N, L + K·L, vocab)
    noisy_logits = logits[:, L:].mT  # (N, vocab, K·L), as cross_entropy wants it
    targets = completions.repeat(1, K)  # (N, K·L)
    return -F.cross_entropy(noisy_logits, targets, reduction="none").view(N, K, L)


def elbo(model, prompts, completions, block_size, masks, steps=None):
    """log π̂ in nats (N,): the mean over K copies of Σ_blocks B/m · Σ_{i hidden} log p(y_i). Every
    block of every copy must hide a token, since its sum is divided by m. (All estimators have the
    same arguments; this one does not use `steps`.)

    It is an unbiased estimate of a lower bound on log π. One block is enough for the argument:
    log π of a completion is the sum of log π(block | true blocks before it), so the bounds of the
    blocks add up.
      1. The sampler writes the B tokens one per step, in random order:
             π(block) = mean over all B! orders of  ∏ over the steps of  p(token | what is visible)
      2. The log of a mean is at least the mean of the logs (Jensen's inequality):
             log π(block) ≥ mean over orders of  Σ over steps of  log p
                          = B · (mean of log p over a random step of a random order)
      3. A prediction depends on which tokens are visible, not on the order in which they were
         written. So this is also a mean over sets. When a random step begins, m tokens are hidden,
         with m uniform on 1..B. In a random order these can be any m tokens, all sets equally
         likely, and each token of a set is equally likely to be written next. So the mean of
         step 2 equals the mean, over m and over sets of m tokens, of (1/m)·Σ_hidden log p. (For
         B = 2 both are hidden with probability 1/2, the first or the second alone with 1/4 each.)
    B times this mean is the *evidence lower bound* of the block, ELBO ≤ log π. A random mask gives
    an unbiased estimate of it.

    (BD3-LM hides each token with a random probability t, and has 1/t in place of B/m. The mean is
    the same.)"""
    log_p = token_log_probs(model, prompts, completions, block_size, masks)  # (N, K, L)
    log_p = log_p.unflatten(-1, (-1, block_size))  # (N, K, L/B, B)
    hidden = masks.unflatten(-1, (-1, block_size))  # (N, K, L/B, B)
    m = hidden.sum(-1, keepdim=True)  # (N, K, L/B, 1)
    per_copy = (block_size / m * hidden * log_p).sum((-2, -1))  # (N, K)
    return per_copy.mean(-1)


# ==== §4  Noise ===================================================================================
# How wrong is that estimate, and how can its noise be removed? log π̂_θ and log π̂_old have
# different random masks. So in the README's example, where an estimate is −4.6, 0 or −9.2, ρ̂ may
# be e^4.6 = 100 or e^9.2 = 10,000 though θ = θ_old and ρ = 1.
#
# At θ = θ_old, say log ρ̂ is normal, with mean 0 and standard deviation σ. Then the mean of ρ̂ is
# e^(σ²/2), not 1. On the base policies of addition σ is about 2 nats (K = 1), so ratios would be
# e² = 7 times too large on average. Real noise has heavier tails, and the average is larger still.
#
# What lowers the noise?
#   * More copies: σ falls as 1/√K. Coupled copies (`coupled_masks`) have less noise than
#     independent ones.
#   * Shared masks (--shared_masks): old and new estimate use the same masks. Where θ = θ_old the
#     ratio is then exactly 1, and later most of the error cancels. Each update has masks of its
#     own, so the old policy must score the batch with all of them, before the first update.
#   * Another ratio, that of text and order of writing together: `trajectory`, below.
#   * The exact likelihood. A block has 2^B − 1 sets of tokens that can be hidden, 3 for B = 2. With
#     a noisy copy for each, a weighted sum of the log p is the ELBO without noise, and a recursion
#     over the sets gives log π.


def coupled_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool in pairs, copies k and k + K/2 (DiffuCoder, arXiv 2506.20639). In each block the
    second of a pair hides what the first shows, or everything if the first shows nothing. So each
    token is hidden at least once. In the README's example a pair always gives −4.6. Each copy alone
    has the distribution of `sample_masks`, since for m < B the counts m and B − m are equally
    likely."""
    assert copies % 2 == 0, f"coupled masks come in pairs: copies must be even, not {copies}"
    first = sample_masks(num_seqs, copies // 2, completion_len, block_size, generator)
    blocks = first.unflatten(-1, (-1, block_size))  # (N, K/2, L/B, B)
    second = ~blocks | blocks.all(-1, keepdim=True)
    return torch.cat((first, second.flatten(-2)), dim=1)


def mean_field(model, prompts, completions, block_size, masks=None, steps=None):
    """The log-probability (N,) that the completion would have if each block were written in one
    step, its tokens independent of each other. It has no noise, but a bias: if the policy writes
    46 or 64, each half of the time, this gives 1/4 to each of 46, 64, 44 and 66, though the last
    two are never written. GRPO learns with it on addition (see .github/results/README.md). (d1,
    Zhao et al., arXiv 2504.12216, does this with a partly hidden prompt.)"""
    everything = torch.ones_like(completions, dtype=torch.bool)[:, None]  # (N, 1, L)
    return token_log_probs(model, prompts, completions, block_size, everything).sum((-2, -1))


def trajectory(model, prompts, completions, block_size, masks=None, steps=None):
    """log p(completion | prompt, order) in nats (N,): Σ log p of each token at the step at which it
    was written. `generate` returns these steps (N,L). No random numbers are used, so the ratio is 1
    at θ = θ_old. It costs B copies. (TraceRL, Wang et al., arXiv 2509.06949.)

    Its ratio is not ρ, but that of the pair (completion y, order o). It is a valid weight as well:
    E_old[π_θ(y,o)/π_old(y,o)·f(y,o)] = E_θ[f(y,o)]. With f = A·∇log π_θ(y,o) this is again the
    gradient of the expected reward. The probability of a random order, 1/B! per block, does not
    depend on θ, so it is left out. (If order="confidence", it does depend on θ, and leaving
    it out is wrong.)"""
    k = torch.arange(block_size, device=steps.device)[:, None]  # (B, 1)
    hidden = steps[:, None] >= k  # (N, B, L): copy k hides what was written at step k or later
    log_p = token_log_probs(model, prompts, completions, block_size, hidden)  # (N, B, L)
    log_p = log_p.take_along_dim(steps[:, None], dim=1)  # (N, 1, L): token i from copy steps[i]
    return log_p.sum((-2, -1))


MAX_EXACT_BLOCK = 6  # 2^6 − 1 = 63 copies in one pass


def every_pattern(model, prompts, completions, block_size):
    """log p for every set of hidden places but the empty one -> patterns (2^B−1, B) bool, and log p
    (N, 2^B−1, L/B, B). A pattern hides the same places in all blocks at once. That loses nothing:
    noisy blocks do not see each other."""
    B, L = block_size, completions.shape[1]
    check_lengths(B, prompts.shape[1], L)
    assert B <= MAX_EXACT_BLOCK, (
        f"exact likelihoods need 2^B - 1 copies: block_size {B} is above {MAX_EXACT_BLOCK}"
    )
    sets = torch.arange(1, 2**B, device=completions.device)  # place i is hidden if bit i is 1
    places = torch.arange(B, device=sets.device)
    patterns = (sets[:, None] >> places) % 2 == 1  # (2^B−1, B), set s in row s−1: [1 0], [0 1], ..
    masks = patterns.repeat(1, L // B).expand(len(completions), -1, -1)  # (N, 2^B−1, L)
    log_p = token_log_probs(model, prompts, completions, B, masks)  # (N, 2^B−1, L)
    return patterns, log_p.unflatten(-1, (-1, B))


def exact_elbo(model, prompts, completions, block_size, masks=None, steps=None):
    """The mean of `elbo` over all masks that `sample_masks` may draw -> (N,): no noise."""
    patterns, log_p = every_pattern(model, prompts, completions, block_size)
    # A pattern with m hidden tokens has the probability 1/(B·C(B,m)), and in the ELBO its tokens
    # have the factor B/m. The product is 1/(m·C(B,m)).
    of_pattern = [1 / (math.comb(block_size, m) * m) for m in patterns.sum(-1).tolist()]
    weights = log_p.new_tensor(of_pattern)[:, None] * patterns  # (2^B−1, B), 0 at visible tokens
    return (weights[:, None] * log_p).sum((1, 2, 3))  # (2^B−1, 1, B) · (N, 2^B−1, L/B, B)


def exact_log_likelihood(model, prompts, completions, block_size, masks=None, steps=None):
    """log π(completion | prompt) in nats (N,), if `generate` writes with order="random" and
    temperature=1. Per block, reach[h] is the probability that at some moment exactly the set h is
    hidden, and all tokens written so far are the completion's. Writing makes the set smaller: to
    reach h, the sampler was at h∪{i} for some i, chose the place i with probability 1/|h∪{i}|, and
    wrote y_i there. So
        reach[h] = Σ_{i not in h} reach[h∪{i}] / |h∪{i}| · p(y_i while h∪{i} is hidden)
    For B = 2 and a block ab:
        reach[{a,b}] = 1,   reach[{b}] = ½ p(a),   reach[{a}] = ½ p(b),
        π = reach[{}] = reach[{b}]·p(b|a) + reach[{a}]·p(a|b)
    For B = 6 these are 6·2⁵ = 192 terms; the mean over orders has 720 with 6 factors each."""
    _, log_p = every_pattern(model, prompts, completions, block_size)  # (N, 2^B−1, L/B, B)
    everything = 2**block_size - 1  # sets are integers: place i is hidden if bit i is 1
    log_reach = {everything: torch.zeros_like(log_p[:, 0, :, 0])}  # (N, L/B) each
    for h in range(everything - 1, -1, -1):  # a set with one bit more is a larger number
        terms = []
        for i in range(block_size):
            if not h & 2**i:  # i is not in the set: it is the one that was written
                before = h + 2**i  # the set with i in it
                write_token = log_p[:, before - 1, :, i]  # (N, L/B); set s is row s−1
                terms.append(log_reach[before] + write_token - math.log(before.bit_count()))
        log_reach[h] = torch.stack(terms).logsumexp(0)
    return log_reach[0].sum(-1)


# --masks: name -> function(num_seqs, copies, completion_len, block_size, generator) -> (N,K,L).
MASKS = {"independent": sample_masks, "coupled": coupled_masks}

# --estimator: name -> function(model, prompts, completions, block_size, masks, steps) -> (N,). The
# arguments are given by name. (--shared_masks shares `masks`, and none that a function draws.)
ESTIMATORS = {
    "elbo": elbo,
    "trajectory": trajectory,
    "mean_field": mean_field,
    "exact_elbo": exact_elbo,
    "exact": exact_log_likelihood,
}

# ==== §5  Losses ==================================================================================
# What do GRPO and StableDRL do with the estimate? Let g be the gradient of log π̂_θ(y) with respect
# to θ. Each loss has the gradient −Σ weight·A·g / divisor; they differ in the weight of a
# completion and in the divisor of the sum. README's table has the weights; the docstrings below
# derive them.
#
# Where every ρ̂ is 1 all losses agree: their gradient is −mean A·g. Their *value* is 0 there: in
# GRPO because Σ A = 0, in StableDRL because log ρ̂ = 0. That is no bug. Only the gradient is used.
#
# Why not a ratio per token, as in a GPT? A term of log π̂ is the log-probability of a token given
# what its mask leaves visible, times B/m. With fresh masks the terms of log π̂_θ and log π̂_old
# belong to different tokens, or to one token while different things are visible. So there is no
# ratio to take term by term; only the sums estimate the same number, the ELBO. (With shared masks,
# or along the trajectory, a ratio per token is possible.)


def group_advantages(rewards, group_size):
    """Rewards (N,), floats, whole numbers or bools -> (N,) float: (reward − mean of its group) /
    (standard deviation of its group). Equal rewards give exactly 0: such a group teaches nothing.
    (If rewards are 0 or 1, and a prompt is solved with probability p, this happens with probability
    p^G + (1−p)^G.)

    The mean of A·g estimates the gradient of the expected reward, with three reservations:
      * g belongs to the estimate: from `elbo` it is on average the gradient of a lower bound.
      * The mean of the group contains the completion's own reward. On average this scales the
        gradient by 1 − 1/G.
      * The division gives more weight to prompts that are nearly always or nearly never solved: the
        divisor is 0.33 if one of eight is right, and 0.5 if four are."""
    check_batch(group_size, rewards)
    groups = (rewards * 1.0).view(-1, group_size)  # (M, G); 1.0: whole numbers to floats
    groups = groups - groups[:, :1]  # so that equal rewards give 0, not a rounding error
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = groups.std(-1, correction=0, keepdim=True)  # divided by G, not G − 1
    return (centred / (deviation + 1e-6)).flatten()  # the authors' code only centres


def check_batch(group_size, *tensors):
    """AssertionError unless all tensors are (N,), with the same N, a multiple of group_size. (A
    column beside a row would broadcast to (N, N), silently.)"""
    N = tensors[0].numel()
    for tensor in tensors:
        assert tensor.shape == (N,), f"shape must be (N,) = ({N},), not {list(tensor.shape)}"
    assert N % group_size == 0, f"{N} completions are not a multiple of group_size {group_size}"


def safe_exp(log_ratio):
    """exp of log_ratio (N,). Above 80 both value and slope are e^80: the excess is subtracted as
    a constant. (float32 ends at e^88, and an infinite ratio times an advantage of 0 would be NaN. A
    clamp would make the slope 0.) If the gradient of the parameters overflows all the same,
    `one_batch` ends the run."""
    overflow = (log_ratio - 80).clamp(min=0).detach()
    return (log_ratio - overflow).exp()


def grpo_loss(log_ratio, advantages, clip_eps, group_size=1):
    """GRPO without KL term (Shao et al., arXiv 2402.03300), with one ratio per completion:
    log_ratio (N,), advantages (N,) -> scalar, −mean min(ρ̂·A, clip(ρ̂)·A). Groups play no role.

    ρ̂ = exp(log π̂_θ − log π̂_old) has the gradient ρ̂·g. Where the min is ρ̂·A, its gradient is
    ρ̂·A·g. Where the min is clip(ρ̂)·A, and the clip changes ρ̂, its gradient is 0. Say ε = 0.2 and
    ρ̂ = 1,000. For A = 1 the objective is min(1000, 1.2), with gradient 0. For A = −1 it is
    min(−1000, −1.2), with gradient −1000·g."""
    check_batch(group_size, log_ratio, advantages)
    ratio = safe_exp(log_ratio)  # (N,)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # counts only where it lowers the objective
    per_sequence = torch.minimum(ratio * advantages, clipped * advantages)
    return -(per_sequence / len(per_sequence)).sum()  # a mean whose sum cannot overflow


def stabledrl_loss(log_ratio, advantages, clip_eps, group_size):
    """StableDRL: log_ratio (N,), advantages (N,) -> scalar, the mean over groups. Its negative
    gradient is, for a group,  Σ_j w_j A_j g_j / Σ_j w_j  with  w_j = clip(ρ̂_j, 1−ε, 1+ε). In GRPO
    ∇ρ̂ = ρ̂·g gives the weight ρ̂ and g together. Here we choose the weight, a constant, and
    log_ratio gives g, since ∇log ρ̂ = g. (Without `detach` there would be a term A·log ρ̂·∇w.)

    What does it gain?
      * By line 1 a weight is at most 1+ε. So beside seven completions of ratio 1 a noisy one has at
        most (1+ε)/(1+ε+7) = 6/13 of the weight, if ε = 5; without line 1 it may have all. (Beside
        seven of ratio 0.01 it may still have nearly all.)
      * By line 2 the update of a group is a weighted mean of its A_j·g_j. So its norm is at most
        max_j |A_j|·‖g_j‖, whatever the ratios are. And each group counts 1/M, while in GRPO groups
        with large ratios outweigh the others.

    What does it give up? In GRPO, once the updates of a batch have moved a completion by more than
    ε in the intended direction, its weight becomes 0. StableDRL goes on moving it. So ε means two
    things: GRPO's (0.2) is a *trust region*, and StableDRL's (5) cuts a long tail."""
    check_batch(group_size, log_ratio, advantages)
    log_lower = math.log(1 - clip_eps) if clip_eps < 1 else -math.inf
    clipped = log_ratio.detach().clamp(log_lower, math.log(1 + clip_eps))  # line 1: always clip
    weights = clipped.view(-1, group_size).softmax(-1).flatten()  # line 2: w_j / Σ w, from log w
    per_sequence = weights * advantages * log_ratio
    return -per_sequence.view(-1, group_size).sum(-1).mean()


def clip_only_loss(log_ratio, advantages, clip_eps, group_size):
    """StableDRL without line 2: weight clip(ρ̂), divisor N. (CISPO, arXiv 2506.13585, does this per
    token, with bounds of its own.)"""
    check_batch(group_size, log_ratio, advantages)
    weights = safe_exp(log_ratio.detach()).clamp(1 - clip_eps, 1 + clip_eps)
    return -(weights * advantages * log_ratio).mean()


# --loss: name -> (function(log_ratio, advantages, clip_eps, group_size) -> scalar, its default ε).
LOSSES = {
    "grpo": (grpo_loss, 0.2),
    "stabledrl": (stabledrl_loss, 5.0),  # the paper's ε; 1 is better here, see the README
    "clip_only": (clip_only_loss, 5.0),  # without line 2
    "norm_only": (stabledrl_loss, 1e300),  # without line 1: no ratio below e^690 is clipped
    "no_ratio": (stabledrl_loss, 0.0),  # every ratio is clipped to 1
}

# ==== §6  Training ================================================================================
# How does it all run? `one_batch` is the algorithm: the policy completes prompts, the task judges,
# and μ updates use the result. `train` repeats it and measures. (With μ = 1 every true ratio is 1,
# and with fresh masks an estimated one is pure noise: use no_ratio.)
#
# Prompts, samples and masks each have a random stream of their own, made from the seed and the
# number of updates done. So all losses with one seed see the same prompts and use the same random
# numbers, and a run that is resumed draws what it would have drawn. All losses with one seed also
# start from the same base policy, which is read from its file.


@dataclasses.dataclass
class Config:
    """The settings of a run. Each is a flag; a flag with several values makes a run for each."""

    # The base policy. The name of its file is made of all settings down to base_lr.
    task: str = "addition"  # what to learn, see toy_tasks
    seed: int = 0  # every seed has a base policy and random numbers of its own
    block_size: int = None  # B, tokens per block; None: the task's own
    d_model: int = 64  # width of the transformer
    n_layer: int = 2  # number of layers
    n_head: int = 4  # attention heads per layer
    base_accuracy: float = 0.4  # pretraining stops at this accuracy, so that RL has work left
    base_lr: float = 1e-3  # learning rate of pretraining; larger models need a smaller one
    # Reinforcement learning.
    # (If neither --loss nor --estimator is given: grpo and stabledrl, each with elbo and exact.)
    loss: str = "stabledrl"  # section 5
    estimator: str = "elbo"  # how log pi is estimated, sections 3 and 4
    masks: str = "independent"  # or coupled, which needs an even number of copies; section 4
    shared_masks: bool = False  # both estimates of a ratio use the same masks, section 4
    copies: int = 1  # K, noisy copies per estimate
    clip_eps: float = None  # epsilon of the clip; None: the loss's own, section 5
    lr: float = 1e-4  # learning rate of RL
    prompts: int = 32  # prompts per batch of completions
    group_size: int = 8  # G, completions per prompt
    mu: int = 2  # updates per batch of completions
    max_grad_norm: float = 1.0  # the norm of the gradient is clipped to this; 1e38 means never
    log_every: int = 40  # updates per line of the log, and per checkpoint: a multiple of mu
    updates: int = 600  # updates of a run, in all
    device: str = "cpu"  # or cuda, mps

    def __post_init__(self):
        check_settings(self)  # §7: fills in what is None, and refuses invalid values


def seed_for(config, purpose):
    """A seed made from the run's seed and a purpose."""
    return random.Random(f"{config.seed} {purpose}").getrandbits(63)


def stream(config, purpose):
    """A random generator for one purpose: nothing else draws from it."""
    return torch.Generator(config.device).manual_seed(seed_for(config, purpose))


def new_model(config):
    """An untrained model on config.device. It sets torch's global seed to config.seed."""
    torch.manual_seed(config.seed)
    vocab_size = len(TASKS[config.task].vocab) + 1
    model = BlockDiffusionTransformer(vocab_size, config.d_model, config.n_layer, config.n_head)
    return model.to(config.device)


def answer(model, task, texts, block_size, **options):
    """The model completes M prompts (strings), options as in `generate`, and the task judges ->
    (batch, rewards (N,)). batch has all that an estimate needs besides the model and the masks:
    prompts (M,P), completions (N,L), their steps (N,L) and block_size."""
    device = model.embed.weight.device
    prompts = torch.as_tensor(encode(task, texts), device=device)
    completions, steps = generate(
        model, prompts, task.completion_len, block_size, return_steps=True, **options
    )
    samples = len(completions) // len(texts)
    rewards = []
    for i, text in enumerate(decode(task, completions)):
        rewards.append(float(task.reward(texts[i // samples], text)))
    batch = dict(prompts=prompts, completions=completions, steps=steps, block_size=block_size)
    return batch, torch.tensor(rewards, device=device)


def evaluate(model, task, block_size, count=500):
    """`count` held-out prompts, always the same, completed greedily, most confident place first ->
    dict. accuracy: the share that is right; writes: the first three prompts with their completions,
    as text."""
    texts, _ = task.sample(np.random.default_rng(0), count, "test")  # _: right completions, unused
    batch, rewards = answer(model, task, texts, block_size, temperature=0, order="confidence")
    right = (rewards == 1).tolist()  # a task may give less for what is partly right
    writes = []
    for prompt, completion, is_right in zip(texts, decode(task, batch["completions"][:3]), right):
        writes.append(f"{prompt}{completion} {'right' if is_right else 'wrong'}")
    return {"accuracy": sum(right) / count, "writes": writes}


def pretrain(config):
    """Pretrain the policy that RL starts from: maximise the ELBO of right completions, until the
    accuracy reaches base_accuracy. (It stops at the first measurement that is high enough, so this
    measurement is a little too high.) TimeoutError if 2,000 updates do not suffice."""
    task, B = TASKS[config.task], config.block_size
    model = new_model(config)
    optimizer = torch.optim.Adam(model.parameters(), config.base_lr)
    rng = np.random.default_rng([config.seed, 0])  # `one_batch` has [seed, 1, updates done]
    masking = stream(config, "pretrain")
    # One more round than updates, to evaluate the last one.
    bar = tqdm(range(2001), disable=None, bar_format="{desc}, {n} updates, {elapsed}")
    for update in bar:
        if update % 10 == 0:
            reached = evaluate(model, task, B)["accuracy"]
            bar.desc = f"pretraining: accuracy {reached:.3f} of {config.base_accuracy}"
            if reached >= config.base_accuracy:
                return model
        if update < 2000:
            texts, solutions = task.sample(rng, 256, "train")
            prompts = torch.as_tensor(encode(task, texts), device=config.device)
            completions = torch.as_tensor(encode(task, solutions), device=config.device)
            masks = sample_masks(256, 1, task.completion_len, B, masking)
            loss = -elbo(model, prompts, completions, B, masks).mean() / task.completion_len
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    raise TimeoutError(f"--base_accuracy {config.base_accuracy} is not reached in 2,000 updates")


@torch.no_grad()  # otherwise torch would keep all 2^B − 1 copies in memory
def true_log_prob(model, **batch):
    """The exact log π of a batch, (N,), to be logged."""
    return exact_log_likelihood(model, **batch)


def one_batch(config, model, optimizer, done, truths=None):
    """The algorithm: `done` updates have been made, and this makes the next μ. It returns the
    batch, its rewards (N,), a list of log ρ̂ (N,) for each update, and a list of the norms of the
    gradients before they are clipped. `truths`: a list to which the exact log π (N,) is
    appended before each update, for the log. FloatingPointError in place of an update that is not
    finite."""
    task, B, G = TASKS[config.task], config.block_size, config.group_size
    estimate, draw_masks = ESTIMATORS[config.estimator], MASKS[config.masks]
    loss_function, _ = LOSSES[config.loss]
    mask_shape = (config.prompts * G, config.copies, task.completion_len)  # (N, K, L)
    masking = stream(config, f"masks {done}")
    torch.manual_seed(seed_for(config, f"yours {done}"))  # for a loss of yours that draws

    # (1) The old policy completes each prompt G times, and the task judges.
    texts, _ = task.sample(np.random.default_rng([config.seed, 1, done]), config.prompts, "train")
    sampling = stream(config, f"samples {done}")
    batch, rewards = answer(model, task, texts, B, samples=G, generator=sampling)
    advantages = group_advantages(rewards, G)  # (N,)

    # (2) The old policy scores its own completions: log π̂_old. Once, with masks that no update
    # uses; or, if masks are shared, once for each update, with that update's masks.
    draw = functools.partial(draw_masks, *mask_shape, B, masking)
    with torch.no_grad():
        if config.shared_masks:
            masks_of_updates = [draw() for _ in range(config.mu)]
            old_log_probs = [estimate(model, masks=m, **batch) for m in masks_of_updates]
        else:
            old_log_probs = [estimate(model, masks=draw(), **batch)] * config.mu
            masks_of_updates = [draw() for _ in range(config.mu)]

    # (3) μ updates: log π̂_θ, the ratio, the loss, a step of the optimiser.
    log_ratios, grad_norms = [], []
    for masks, old_log_prob in zip(masks_of_updates, old_log_probs):
        log_prob = estimate(model, masks=masks, **batch)  # (N,)
        log_ratio = log_prob - old_log_prob  # log ρ̂
        check_batch(G, advantages, log_ratio)
        loss = loss_function(log_ratio, advantages, config.clip_eps, G)
        is_loss = loss.shape == () and loss.requires_grad
        assert is_loss, f"the loss {config.loss} must be a scalar that depends on log_ratio"
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not (loss + grad_norm + log_ratio.sum()).isfinite():  # NaN or ∞ if one of them is
            raise FloatingPointError(
                f"update {done + len(log_ratios) + 1} was not made: loss {loss:.3g}, "
                f"gradient norm {grad_norm:.3g}"
            )
        if truths is not None:  # before the step, as log_prob
            truths.append(true_log_prob(model, **batch))
        optimizer.step()
        log_ratios.append(log_ratio.detach())
        grad_norms.append(grad_norm.item())
    return batch, rewards, log_ratios, grad_norms


def ratio_diagnostics(log_ratio, clip_eps, group_size):
    """log_ratio (N,) -> dict of floats, about ratios before any clipping. ratio_max: the largest
    ρ̂. clip_fraction: the share of ρ̂ outside [1−ε, 1+ε], whether the loss clips there or not. ess:
    effective sample size of a group, (Σρ̂)²/Σρ̂², mean over groups: G if all count alike, 1 if only
    one does."""
    log_ratio = log_ratio.detach().cpu().double()
    ratio = log_ratio.clamp(max=700).exp()  # e^710 is infinite, and JSON has no infinity
    outside = (ratio < 1 - clip_eps) | (ratio > 1 + clip_eps)
    share = log_ratio.view(-1, group_size).softmax(-1)  # (M, G): ρ̂/Σρ̂
    return {
        "ratio_max": ratio.max().item(),
        "clip_fraction": outside.double().mean().item(),
        "ess": (1 / share.square().sum(-1)).mean().item(),
    }


def first_checkpoint(config, base_model):
    """The checkpoint of update 0, and its row of the log: the reward of 2,000 completions of
    training prompts, and what `evaluate` finds."""
    task, B = TASKS[config.task], config.block_size
    texts, _ = task.sample(np.random.default_rng(1), 2_000, "train")
    _, rewards = answer(base_model, task, texts, B, generator=stream(config, "base"))
    row = {"update": 0, "reward": rewards.mean().item()} | evaluate(base_model, task, B)
    return {"model": base_model.state_dict(), "optimizer": None, "rows": [row]}


def train(config, base_model, checkpoint=None):
    """RL from the base policy, or from a checkpoint onwards. Whenever a row of the log is due it
    yields a checkpoint: a dict of `model` and `optimizer` (states), and all `rows` (dicts) so far.
    A row has its `update`, and the means, over all updates since the row before, of `reward`,
    `grad_norm` (before it is clipped), `clip_fraction` and `ess` (see `ratio_diagnostics`). It
    also has
      * `ratio_max`: the largest ρ̂ since the row before;
      * `spread`: the standard deviation of log ρ̂ at a batch's first update, mean over batches;
      * `accuracy`, `writes`, `seconds` (since this call): at the row's update;
      * `noise_std`, for B up to 6: the standard deviation of log ρ̂ − log ρ at the row's update;
      * `drift`, for B up to 6: the mean of log π_old − log π_base in the row's batch, an estimate
        of their KL.
    `train` touches no file. Errors: see `one_batch`, `generate`."""
    task, B = TASKS[config.task], config.block_size
    model = copy.deepcopy(base_model)
    betas = (0.9, 0.99)  # as in StableDRL's release
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas)
    checkpoint = copy.deepcopy(checkpoint or first_checkpoint(config, base_model))
    model.load_state_dict(checkpoint["model"])
    if checkpoint["optimizer"]:
        optimizer.load_state_dict(checkpoint["optimizer"])
    rows, recent = checkpoint["rows"], collections.defaultdict(list)
    began = time.perf_counter()
    for done in range(rows[-1]["update"], config.updates, config.mu):
        row_is_due = (done + config.mu) % config.log_every == 0
        truths = [] if row_is_due and B <= MAX_EXACT_BLOCK else None
        batch, rewards, log_ratios, grad_norms = one_batch(config, model, optimizer, done, truths)

        recent["reward"].append(rewards.mean().item())
        recent["grad_norm"] += grad_norms
        recent["spread"].append(log_ratios[0].std(correction=0).item())  # ρ = 1 here: pure noise
        for log_ratio in log_ratios:
            numbers = ratio_diagnostics(log_ratio, config.clip_eps, config.group_size)
            for name, number in numbers.items():
                recent[name].append(number)
        if row_is_due:
            row = {"update": done + config.mu} | evaluate(model, task, B)
            for name, numbers in recent.items():
                row[name] = sum(numbers) / len(numbers)
            row["ratio_max"] = max(recent["ratio_max"])
            if truths:
                # log ρ̂ − log ρ at the batch's last update; truths[0] is log π_old
                noise = log_ratios[-1] - (truths[-1] - truths[0])
                drift = truths[0] - true_log_prob(base_model, **batch)
                row["noise_std"] = noise.std(correction=0).item()
                row["drift"] = drift.mean().item()
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
            recent.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
            yield copy.deepcopy(state)  # training goes on to change the original


# ==== §7  Command line ============================================================================
# Nothing here belongs to the method: files, flags, processes, a table and a figure. `train` yields
# checkpoints, and `run` writes them down. To resume a run, `train` gets its last checkpoint. A
# file also has two fingerprints, `probe` of its model and `base` of the base policy, so that files
# of another model or base policy are refused.

REFUSED = (AssertionError, ValueError, OSError, RuntimeError, FloatingPointError, MemoryError)
SQUARE = {"loss": ["grpo", "stabledrl"], "estimator": ["elbo", "exact"]}  # if neither flag is given
SETTINGS = [field.name for field in dataclasses.fields(Config)]
BASE = SETTINGS[: SETTINGS.index("loss")]  # the settings of the base policy
UNNAMED = ("seed", "estimator", "updates", "device")  # never in a run's name as setting=value
PANELS = {"reward": "reward", "ratio_max": "largest ratio", "grad_norm": "gradient norm"}
COLOURS = "tab:red tab:orange tab:blue tab:cyan tab:green tab:purple tab:brown tab:pink gold black"
CHOICES = {"task": TASKS, "loss": LOSSES, "estimator": ESTIMATORS, "masks": MASKS}
LEAST = {"seed": 0, "group_size": 2, "max_grad_norm": 1e-9}  # others: 1 if int, else 0


def check_settings(config):
    """Fill in what is None. AssertionError for an invalid value, RuntimeError under python -O."""
    if not __debug__:
        raise RuntimeError("python -O removes all checks: run python without it")
    for name, choices in CHOICES.items():
        assert getattr(config, name) in choices, f"--{name} is one of {', '.join(choices)}"
    if config.block_size is None:
        config.block_size = TASKS[config.task].block_size
    if config.clip_eps is None:
        config.clip_eps = LOSSES[config.loss][1]
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if kind is not str:
            least = LEAST.get(name, int(kind is int))
            must = f"--{name} must be a finite {kind.__name__}, and at least {least}"
            assert isinstance(value, (int, float)) and least <= value < math.inf, must
            assert kind(value) == value, must
            setattr(config, name, kind(value))  # so that 1, 1.0 and True make one run
    assert config.base_accuracy <= 1, "--base_accuracy must be at most 1"
    assert config.log_every % config.mu == 0, "--log_every must be a multiple of --mu"
    assert config.updates % config.log_every == 0, "--updates must be a multiple of --log_every"


def policy_words(config):
    """Task, loss, estimator, and all settings but UNNAMED that differ from the defaults."""
    usual = vars(Config(task=config.task, loss=config.loss))
    words = [config.task, config.loss, config.estimator]
    for name, value in vars(config).items():
        if value != usual[name] and name not in UNNAMED:
            words.append(f"{name}={value}")
    return words


def run_name(config):
    """The name of a run and of its folder, for example addition-grpo-elbo-lr=0.0002-seed=0."""
    return "-".join([*policy_words(config), f"seed={config.seed}"])


def base_path(config, out):
    """The file of the base policy: one for all runs in the folder `out` that agree in BASE."""
    return Path(out, f"base-{'-'.join(str(getattr(config, name)) for name in BASE)}.pt")


def probe(model):
    """Logits for a fixed text. The same weights in another architecture (another norm, another
    number of heads) give other logits."""
    tokens = torch.arange(model.mask_id, device=model.embed.weight.device)
    with torch.no_grad():
        return model(tokens[None], tokens, block_causal_mask(len(tokens), 2, tokens.device)).cpu()


def save(path, model, state):
    """Write a checkpoint under another name, then rename it, so that no checkpoint is ever half
    written. `base` is the probe of the run's base policy; the file of a base policy holds its
    own."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    own = probe(model)
    torch.save({"base": own} | state | {"probe": own}, unfinished)
    os.replace(unfinished, path)


def load(path, model):
    """Read the weights into the model, and return what `save` wrote. ValueError if it does not
    fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no foreign code
        model.load_state_dict(state["model"])
        if not torch.allclose(probe(model), state["probe"], atol=1e-3):
            raise ValueError("another architecture wrote it")
        assert {"optimizer", "rows", "base"} <= state.keys(), "it is no checkpoint"
        return state
    except Exception as error:  # a damaged file makes torch raise errors of any kind
        reason = f"{type(error).__name__} {str(error)[:200]}"
        advice = "if it is damaged or of another model, delete it, or choose another --out"
        raise ValueError(f"{path} cannot be used: {advice} ({reason})") from None


def load_start(out, config):
    """-> the base policy, and the checkpoint to go on from: the run's own, or else that of its base
    (None if it is not made yet)."""
    base_model, base = new_model(config), None
    if base_path(config, out).exists():
        base = load(base_path(config, out), base_model)
    path = Path(out, run_name(config), "checkpoint.pt")
    if not path.exists():
        return base_model, base
    checkpoint = load(path, new_model(config))
    same_base = base is None or torch.equal(checkpoint["base"], base["probe"])
    assert same_base, f"{path} began from another base policy: choose another --out"
    made = checkpoint["rows"][-1]["update"]
    assert made <= config.updates, f"--updates {config.updates}: {path.parent} has {made} already"
    return base_model, checkpoint


def trial(out, resume, config):
    """A look at the files that exist, and one batch of two prompts on an untrained model, so that
    bad settings fail early."""
    folder = Path(out, run_name(config))
    assert resume or not folder.exists(), (
        f"{folder} exists: --resume, or another --out if the code changed"
    )
    load_start(out, config)
    task = TASKS[config.task]
    for prompt, completion in zip(*task.sample(np.random.default_rng(0), 8, "train")):
        lengths = (len(prompt), len(completion)) == (task.prompt_len, task.completion_len)
        right = lengths and task.reward(prompt, completion) == 1
        assert right, (
            f"task {task.name}: {prompt!r} {completion!r} has another length or no reward 1"
        )
    small = dataclasses.replace(config, prompts=2, log_every=config.mu, updates=config.mu)
    model = new_model(config)
    start = {"model": model.state_dict(), "optimizer": None, "rows": [{"update": 0}]}
    try:
        next(train(small, model, start))
    except REFUSED as error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if "torch" not in frame.filename and not frame.filename.endswith("stabledrl.py"):
                raise ValueError(f"{frame.filename}, line {frame.lineno}: {error}") from None
        raise


def make_base(out, config):
    """Pretrain the base policy, if its file does not exist."""
    if not base_path(config, out).exists():
        model = pretrain(config)
        save(base_path(config, out), model, first_checkpoint(config, model))


def run(out, config):
    """Train, or go on -> rows of the log, and whether the run failed. The log is written before the
    checkpoint: if killed in between, a resumed run makes the last row again."""
    base_model, checkpoint = load_start(out, config)
    folder, model, base = Path(out, run_name(config)), new_model(config), checkpoint["base"]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for checkpoint in itertools.chain([checkpoint], train(config, base_model, checkpoint)):
            rows = checkpoint["rows"]
            lines = [json.dumps(line, allow_nan=False) + "\n" for line in [vars(config), *rows]]
            (folder / "log.jsonl").write_text("".join(lines))
            model.load_state_dict(checkpoint["model"])
            save(folder / "checkpoint.pt", model, checkpoint | {"base": base})
            numbers = "update {update}  reward {reward:.3f}".format(**rows[-1])
            print(f"{run_name(config)}  {numbers}", flush=True)
    except FloatingPointError as error:  # an outcome of the experiment, and no bug
        print(f"{run_name(config)} FAILED: {error}", flush=True)
        return rows, True
    return rows, False


def attempt(work, out, config):
    """work(out, config), or None if an error ends it: the other runs go on."""
    try:
        return work(out, config)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{run_name(config)} FAILED: {error}", flush=True)
    except Exception:  # in a loss or a task of your own: the traceback says where
        print(f"{run_name(config)} FAILED: {traceback.format_exc()}", flush=True)


def start_worker():
    """What a process does first: arrange to die quietly on Ctrl-C, and when the program dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the signal if the parent dies
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(work, configs, fork):
    """[work(config) for each], in forked processes, as many at a time as the cores allow; without
    fork in this one. The process that forks must never have run a backward pass. (Where torch sees
    a GPU, a backward pass starts threads, and they would be missing in the children.)"""
    if not fork:
        return [work(config) for config in configs]
    jobs = max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())
    # Without `with`, which would wait for the workers on Ctrl-C. An unused pool ends by itself.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), start_worker)
    return list(pool.map(work, configs))


def refuse(message):
    """End with one line and status 2: bad input, and no work was done."""
    sys.stderr.write(f"stabledrl.py: error: {' '.join(str(message).split())}\n")
    sys.exit(2)


def parse(argv):
    """Command line -> (configs, --out, --resume): a config for each combination of values."""
    parser = argparse.ArgumentParser(
        usage="python stabledrl.py [--SETTING VALUE ..] .. [--out FOLDER] [--resume]",
        description=inspect.getsource(Config).split("    def ")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse
    parser.add_argument("--out", default="runs", help="folder for all files; default: runs")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with old runs")
    for field in dataclasses.fields(Config):
        # --shared_masks alone means --shared_masks 1
        kind, least = (int, "*") if field.type is bool else (field.type, "+")
        parser.add_argument(f"--{field.name}", type=kind, nargs=least, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    out, resume = given.pop("out"), given.pop("resume")
    if not given.keys() & SQUARE.keys():
        given |= SQUARE
    configs = {}
    for values in itertools.product(*[values or [1] for values in given.values()]):
        config = Config(**dict(zip(given, values)))
        first = configs.setdefault(run_name(config), config)
        twice = f"{run_name(config)} cannot have two values of --updates or --device"
        assert first == config, twice
    return list(configs.values()), out, resume


def over_seeds(numbers, digits):
    """Mean ± standard deviation, as text."""
    deviation = f" ± {np.std(numbers, ddof=1):,.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):,.{digits}f}{deviation}"


def table(policies):
    """Lines of text: label -> (rows of the log, failed) of each seed, behind their base policy. A
    run that failed counts as 0."""
    width = max(map(len, ["base policy", *policies]))
    head = f"{'':{width}}  {'reward':15} {'accuracy':15} {'x base':13} examples"
    behind = {}  # base policy's line -> lines of its runs
    for label, seeds in policies.items():
        bases, ends = [rows[0] for rows, _ in seeds], []
        for rows, failed in seeds:
            ends.append(rows[-1] | {"reward": 0, "accuracy": 0} if failed else rows[-1])
        for name, of_seeds in (("base policy", bases), (label, ends)):
            rewards = [row["reward"] for row in of_seeds]
            accuracies = over_seeds([row["accuracy"] for row in of_seeds], 3)
            times = [reward / (base["reward"] or math.nan) for reward, base in zip(rewards, bases)]
            numbers = f"{over_seeds(rewards, 3):15} {accuracies:15} {over_seeds(times, 2):13}"
            line = f"{name:{width}}  {numbers} {',  '.join(of_seeds[0]['writes'])}"
            if of_seeds is bases:
                of_base = behind.setdefault(line, [])
            else:
                of_base.append(line)
    return [head, *itertools.chain(*([line, *of_base] for line, of_base in behind.items()))]


def plot(policies, path):
    """A panel for each of PANELS (column of the log: title). Seeds are thin. Their mean, on
    a logarithmic axis their median, is thick, as far as all of them go. A cross marks the end of a
    run that failed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 + 0.1 * len(policies)), layout="constrained")
    axes, colours = figure.subplots(1, len(PANELS)), COLOURS.split()
    for axis, (column, title) in zip(axes, PANELS.items()):
        scale, absent, average = "log", math.nan, np.median  # there is no log of 0
        if column == "reward":
            scale, absent, average = "linear", 0, np.mean
        axis.set(title=title, xlabel="update", yscale=scale)
        for i, (label, seeds) in enumerate(policies.items()):
            style = {"color": colours[i % 10], "linestyle": ("-", "--", ":")[i // 10 % 3]}
            lines = []
            for rows, failed in seeds:
                updates = [row["update"] for row in rows]
                lines.append([row.get(column) or absent for row in rows])
                mark = "x" if failed else ""
                axis.plot(updates, lines[-1], marker=mark, markevery=[-1], linewidth=0.6, **style)
            middle = [average(numbers) for numbers in zip(*lines)]  # ends with the shortest
            if column == "reward":
                base = {"color": "grey", "linestyle": ":", "label": "" if i else "base policy"}
                axis.axhline(middle[0], **base)
            axis.plot(updates[: len(middle)], middle, linewidth=2, label=label, **style)
    axes[0].set_ylim(0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path)


def main(argv=None):
    """Run what the command line asks for. Status 2 for bad input, 1 if a run failed."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a run's log is then the same alone and beside others
    try:
        configs, out, resume = parse(argv)
        fork = len(configs) > 1 and sys.platform == "linux" and configs[0].device == "cpu"
        torch.optim.Adam([torch.zeros(1)])  # its first use imports for 1 s: not in each worker
        launch(functools.partial(trial, out, resume), configs, fork)
        Path(out).mkdir(parents=True, exist_ok=True)
        assert os.access(out, os.W_OK), f"--out {out} cannot be written"
    except REFUSED as error:
        refuse(error)
    bases = {base_path(config, out): config for config in configs}
    launch(functools.partial(attempt, make_base, out), bases.values(), fork)
    ready = [config for config in configs if base_path(config, out).exists()]
    results = launch(functools.partial(attempt, run, out), ready, fork)
    policies = collections.defaultdict(list)  # label -> (rows, failed) of each seed
    for config, result in zip(ready, results):
        if result:
            policies[", ".join(policy_words(config))].append(result)
    if policies:
        print(*table(policies), sep="\n")
        try:
            plot(policies, Path(out, "plot.svg"))
        except ImportError:
            print("no figure: pip install matplotlib, and repeat the command with --resume")
    if len(ready) < len(configs) or any(result is None or result[1] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except BrokenExecutor as error:  # a worker was killed, by the system out of memory for example
        sys.exit(f"stabledrl.py: {error} The same command with --resume goes on.")
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from the last lines", flush=True)
        os._exit(1)  # and with it its workers: see start_worker
