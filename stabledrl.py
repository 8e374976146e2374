"""StableDRL in one file: reinforcement learning for diffusion language models that survives the
noise on which GRPO collapses.

Source: Zhong et al., Stabilizing Reinforcement Learning for Diffusion Language Models, arXiv
2603.06743. A diffusion language model fills in blanks, in any order. The toy tasks here have blocks
of blanks so short that the exact probability of a completion can be computed. So the noise of its
estimates can be measured, and switched off.

How rewards train a model. The model, seen as a writer of completions, is a *policy* π_θ with
weights θ. It completes each prompt G times; these G completions are a *group*. A judge gives each a
reward. Its *advantage* A says how much better it did than its group: it is *good* if A > 0, and
*bad* if A < 0. Gradient ascent on Σ A·log π_θ(completion) raises the expected reward as long as π_θ
is the policy that wrote the completions, π_old. (This is REINFORCE: the gradient of E[reward] is
E[reward·∇log π_θ], and since E[∇log π_θ] = 0 a number that does not depend on the completion may be
subtracted from the reward.) After one step π_θ is another policy. To use the completions for μ
steps, PPO and GRPO weigh them by the *importance ratio* ρ = π_θ/π_old. The reason is importance
sampling: E_old[ρ·f] = E_θ[f] for any f, so weighted samples of the old policy average like samples
of the new one. With f = A·∇log π_θ this is the gradient above. At the first step every ρ is 1.

Why GRPO breaks on such a model:
  1. A block can be written in many orders, so its probability is a mean over orders. That is too
     much to compute for a real model, with blocks of 32 tokens or more. So log π is *estimated*,
     with random numbers (§3), and instead of ρ one has ρ̂ = exp(log π̂_θ − log π̂_old).
  2. exp magnifies noise: a completion whose ρ is 1 may get a ρ̂ of 10,000 (§4).
  3. GRPO bounds the weight of a completion only where that lowers its objective (§5). With ρ̂ =
     10,000 a good completion gets weight 0, and a bad one weight 10,000.
  4. So nearly all of an update pushes a few bad completions down, those with the most noise.
  5. Pushing up stops by itself, as the gradient of log p with respect to the logits vanishes for
     p → 1. It does not vanish for p → 0, so pushing down never stops. And all completions share θ,
     so each push also moves the good ones.
StableDRL (§5) is two lines: clip every ratio, whatever the sign of A; then divide the ratios of a
group by their sum.

The sections, each answering the question that the one before leaves open:
  §1 Transformer    what reads?                   §5 Losses         what GRPO and StableDRL make of it
  §2 Sampler        how does it write?            §6 Training       how does it all run?
  §3 Estimate       how likely is what it wrote?  §7 Command line   files, flags, processes, figure
  §4 Noise          how wrong is that estimate?
Whoever has fifteen minutes reads this page, §5, and `one_batch` in §6.

Notation: symbol, name in the code, shape, meaning. A hat marks an estimate.
  q       prompts      (M, P)     M prompts of P tokens; in the toy task of addition, "12+34="
  y       completions  (N, L)     N = M·G, of L tokens, "46.."; rows i·G .. i·G+G−1 are the group of
                                  prompt i
  B       block_size              tokens per block; P and L are multiples of B. B = 2: "46", ".."
  G       group_size              completions per prompt
  K       copies                  copies of y with hidden tokens ("noisy copies") per estimate
          masks        (N, K, L)  True where a copy shows [MASK] in place of its token. (An attention
                                  mask, `mask`, is another thing: who may look at whom)
          steps        (N, L)     the step of its block, 0..B−1, at which a token was written
  log π̂   log_prob     (N,)       estimate of log π(y|q) in nats (natural logarithm)
  log ρ̂   log_ratio    (N,)       log π̂_θ − log π̂_old: one number per completion
  A       advantages   (N,)       reward relative to the group
  ε       clip_eps                ratios are clipped to [1−ε, 1+ε]
  μ       mu                      optimiser steps ("updates") that use one batch of completions
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
import numbers
import os
import pickle
import random
import signal
import statistics
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

# A task makes prompts and judges completions, as strings: toy_tasks/__init__.py lists its parts.
from toy_tasks import TASKS, decode, encode

# ==== §1  Transformer =============================================================================
# What reads? An ordinary transformer that is told by an attention mask who may look at whom. Under
# a causal mask, and with targets shifted by one, it would be a GPT. Three details matter later:
#   * Positions are an argument, so a noisy copy can use the positions of its original (§3).
#   * [MASK] can be an input but never a prediction.
#   * `read` returns the keys and values of what it has read, the *cache*. A later `read` goes on
#     from there, so finished text is read once.
# In shapes, S is the number of tokens read now, and T is S plus the cached tokens before them. H is
# the number of heads, D the features of a head.


def rotate(x, rotation):
    """Rotary position embedding (Su et al. 2021), (..,S,D) -> (..,S,D). Pairs of features are
    complex numbers; rotation (S,D/2) turns them by angles that grow with the position."""
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
        """x (N,S,d_model), mask (S,T), cache (2,M,H,T−S,D) or None -> (N,S,d_model), and the keys
        and values of all T tokens, the new cache (2,N,H,T,D)."""
        qkv = self.qkv(self.norm1(x))  # (N, S, 3·d_model)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (N, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, S, D)
        keys_values = torch.stack((rotate(k, rotation), v))  # (2, N, H, S, D)
        if cache is not None:
            samples = len(x) // cache.shape[1]  # rows of x per cached text: N/M, or 1
            cache = cache.repeat_interleave(samples, dim=1)  # (2, N, H, T−S, D)
            keys_values = torch.cat((cache, keys_values), dim=3)  # (2, N, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, rotation), *keys_values, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), keys_values


class BlockDiffusionTransformer(nn.Module):
    """Predicts every token at its own place (no shift by one) from whatever the mask lets it see.
    vocab_size counts [MASK], the last id."""

    def __init__(self, vocab_size, d_model=64, n_layer=2, n_head=4):
        super().__init__()
        assert d_model % (2 * n_head) == 0, (
            f"d_model {d_model} is not a multiple of 2*{n_head} heads"
        )
        self.mask_id = vocab_size - 1
        self.head_dim = d_model // n_head
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size - 1, bias=False)  # no row for [MASK]
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, positions, mask):
        """tokens (N,S) long, positions (S,) long, mask (S,S) bool, True where the row may look at
        the column -> logits (N,S,vocab_size); that of [MASK] is −inf."""
        return self.read(tokens, positions, mask)[0]

    def read(self, tokens, positions, mask, cache=None):
        """Read tokens that follow a cached text -> logits (N,S,vocab_size), and the new cache. mask
        (S,T); cache: what an earlier `read` returned, or None if no text stands before."""
        exponents = torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim
        rotation = torch.exp(1j * positions[:, None] * 10_000.0**-exponents)  # (S, D/2)
        x = self.embed(tokens)  # (N, S, d_model)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(x, rotation, mask, cache[i] if cache else None)
            new_cache.append(keys_values)
        logits = self.head(self.norm(x))
        return F.pad(logits, (0, 1), value=-math.inf), new_cache


def block_causal_mask(length, block_size, device=None):
    """(length, length) bool, True = the row may look at the column: at its own block and all before
    it. Finished text is read under this mask. For length 4 and block_size 2 (# = True):
        # # . .
        # # . .
        # # # #
        # # # #
    """
    block = torch.arange(length, device=device) // block_size  # (length,)
    return block[:, None] >= block[None, :]


def check_lengths(block_size, *lengths):
    """AssertionError unless all are multiples of block_size. Blocks are counted from the first token
    of the prompt. If a prompt ended within a block, that block would also hold the first tokens of
    the completion, and the blocks that are scored would not be those that were written."""
    for length in lengths:
        assert length % block_size == 0, (
            f"lengths {lengths} must be multiples of block_size {block_size}"
        )


# ==== §2  Sampler =================================================================================
# How does it write? Block after block, left to right. A block begins as B times [MASK]. Each step
# reads the block, chooses one masked place, and writes a token there:
#   * *Where* is chosen at random (order="random").
#   * *What* is drawn from the model's prediction for that place.
# So π(block) is a plain mean over the B! orders of the product of these predictions. RL trains this
# policy, and `reward` in the log is its reward. With B = 1 there is one order, and the model
# factorises like a GPT.
#
# Real models mostly write where they are surest (order="confidence"), since their completions are
# then better. That is another policy, to which §3 and §4 do not apply: the order follows from θ,
# and changes while θ moves. Here it serves for evaluation, with the likeliest token at each place:
# this is `accuracy` in the log.
#
# What is read at each step, for B = 2: right of the bar. Left of it: cached. _ is [MASK].
#     |12+34=      12+34=|__   12+34=|4_   12+34=|46      12+34=46|__   12+34=46|_.
# The first and the fourth only fill the cache.


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
    """Complete prompts (M,P), each `samples` times in a row -> (N,L) long, N = M·samples; with
    return_steps also (N,L) long, the step of its block, 0..B−1, at which a token was written.
    temperature divides the logits; 0 takes the likeliest token. FloatingPointError for logits that
    are not finite."""
    prompts = torch.as_tensor(prompts)
    (M, P), L, B, device = prompts.shape, completion_len, block_size, prompts.device
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
        block_positions, block_mask = positions[begin:end], mask[begin:end, :end]
        places = slice(begin - P, end - P)
        block = completions[:, places]  # (N, B), a view: writing here writes there
        uniform = torch.rand(block.shape, generator=generator, device=device)  # (N, B)
        for step in range(B):
            logits, _ = model.read(block, block_positions, block_mask, cache)  # (N, B, vocab)
            priority = uniform if order == "random" else logits.softmax(-1).amax(-1)  # (N, B)
            priority = priority.masked_fill(block != model.mask_id, -1)  # what is written stays
            place = priority.argmax(-1, keepdim=True)  # (N, 1)
            logits = logits.take_along_dim(place[:, :, None], dim=1)[:, 0]  # (N, vocab)
            if not logits.logsumexp(-1).isfinite().all():
                raise FloatingPointError("the model's logits are not finite")
            token = logits.argmax(-1, keepdim=True)  # (N, 1)
            if temperature > 0:
                p = (logits / temperature).softmax(-1)  # (N, vocab)
                token = torch.multinomial(p, 1, generator=generator)
            block.scatter_(1, place, token)
            steps[:, places].scatter_(1, place, step)
        if end < P + L:
            _, cache = model.read(block, block_positions, block_mask, cache)
    return (completions, steps) if return_steps else completions


# ==== §3  Estimate ================================================================================
# How likely is what it wrote? The *forward process* of diffusion destroys a text, which here means
# that it hides tokens: in every block it draws a count m uniformly from 1..B, and puts [MASK] in
# place of m random tokens. The model predicts them. A weighted sum of the log-probabilities that it
# gives to them estimates log π(completion): see `elbo`. Pretraining maximises this estimate, and RL
# uses it as log π̂.
#
# One pass scores all blocks. Each is to be read with the true text before it, and without a look at
# the tokens that are hidden from it. So the model reads the completion clean (nothing hidden), and
# beside it K noisy copies, each with other tokens hidden, under the *staircase* mask: a noisy token
# may look at its own noisy block, and at clean blocks *strictly before* its own. Predictions are
# taken at the noisy copies.


def sample_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, True = hidden: in each block m ~ U{1..B} random places, on the generator's
    device."""
    check_lengths(block_size, completion_len)
    shape, device = (num_seqs, copies, completion_len // block_size), generator.device
    m = torch.randint(1, block_size + 1, (*shape, 1), generator=generator, device=device)
    uniform = torch.rand(*shape, block_size, generator=generator, device=device)  # (N, K, L/B, B)
    rank = uniform.argsort(-1).argsort(-1)  # argsort twice gives ranks: .7 .1 .4 -> 2 0 1
    return (rank < m).flatten(-2)  # (N, K, L)


def staircase_positions(prompt_len, completion_len, copies=1, device=None):
    """(S,) long, S = P + L + K·L: noisy copies reuse the positions P..P+L−1 of the completion."""
    clean = torch.arange(prompt_len + completion_len, device=device)  # (P + L,)
    return torch.cat((clean, clean[prompt_len:].repeat(copies)))


def staircase_mask(prompt_len, completion_len, block_size, copies=1, device=None):
    """(S,S) bool, True = the row may look at the column, for [prompt | clean completion | noisy
    copy 1 | .. | noisy copy K], S = P + L + K·L. Source: the paper's staircase attention, with the
    algebra of BD3-LM's mask (Arriola et al. 2025) and a prompt that is never noisy. The prompt is
    read block by block, like all clean text. For P = 4, L = 4, B = 2, K = 2:
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
    block = staircase_positions(P, L, copies, device) // block_size  # (S,) 0, 1, ..
    index = torch.arange(len(block), device=device)  # (S,)
    # (S,) k for noisy copy k; 0 for the clean completion and (negative before the clamp) the prompt
    copy_of = ((index - P) // L).clamp(min=0)
    from_block, to_block = block[:, None], block[None, :]
    from_copy, to_copy = copy_of[:, None], copy_of[None, :]
    clean_to_clean = (from_copy == 0) & (to_copy == 0) & (from_block >= to_block)
    noisy_to_clean = (from_copy > 0) & (to_copy == 0) & (from_block > to_block)  # must be >
    noisy_to_own_block = (from_copy > 0) & (from_copy == to_copy) & (from_block == to_block)
    return clean_to_clean | noisy_to_clean | noisy_to_own_block


def token_log_probs(model, prompts, completions, block_size, masks):
    """log p(y_i | its noisy block, the clean text before it) at every place i of every copy:
    prompts (M,P), completions (N,L), masks (N,K,L) bool -> (N,K,L). Where y_i is visible the value
    means nothing: callers must leave it out. Each prompt is read once, under the first P rows of
    `staircase_mask`, for all of its N/M completions. Then one pass under the other rows reads
    [completion | K noisy copies], (K+1)·L tokens."""
    (N, K, L), P = masks.shape, prompts.shape[1]
    mask = staircase_mask(P, L, block_size, K, prompts.device)  # (S, S), S = P + L + K·L
    positions = staircase_positions(P, L, K, prompts.device)  # (S,)
    noisy = torch.where(masks, model.mask_id, completions[:, None])  # (N, K, L)
    tokens = torch.cat((completions, noisy.flatten(1)), dim=1)  # (N, L + K·L)
    _, cache = model.read(prompts, positions[:P], mask[:P, :P])
    logits, _ = model.read(tokens, positions[P:], mask[P:], cache)  # (N, L + K·L, vocab)
    noisy_logits = logits[:, L:].mT  # (N, vocab, K·L), as cross_entropy wants it
    targets = completions.repeat(1, K)  # (N, K·L)
    return -F.cross_entropy(noisy_logits, targets, reduction="none").view(N, K, L)


def elbo(model, prompts, completions, block_size, masks, steps=None):
    """log π̂ in nats (N,): the mean over K copies of Σ_blocks B/m · Σ_{i hidden} log p(y_i). Every
    block of every copy must hide a token. (`steps` is not used: all estimators have one signature.)

    Why is that an estimate of log π? One block is enough for the argument, since log π of a
    completion is the sum over its blocks.
      1. The sampler writes the B tokens one per step, in random order:
             π(block) = mean over all B! orders of  ∏ over the B steps of  p(token | what is visible)
      2. The log of a mean is at least the mean of the logs (Jensen's inequality):
             log π(block) ≥ mean over orders of  Σ over steps of  log p
                          = B · (mean of log p over a random step of a random order)
      3. A prediction depends on which tokens are visible, not on the order in which they were
         written. So that mean needs no orders. When a random step begins, m tokens are hidden, with
         m uniform on 1..B. In a random order every set of m tokens is equally likely to be the
         hidden one, and each of its tokens equally likely to be written next. So the mean in 2. is
         a mean over m, and over sets of m tokens, of (1/m)·Σ_hidden log p. (For B = 2: with
         probability 1/2 both are hidden, with 1/4 the first alone, with 1/4 the second alone.)
    B times this mean is the *evidence lower bound* of the block, ELBO ≤ log π. A random mask gives
    an unbiased estimate of it. (BD3-LM hides each token with a probability t, uniform on (0, 1),
    and divides by t. Its mean is this ELBO.)"""
    log_p = token_log_probs(model, prompts, completions, block_size, masks)  # (N, K, L)
    blocks = (-1, block_size)
    log_p, hidden = log_p.unflatten(-1, blocks), masks.unflatten(-1, blocks)  # (N, K, L/B, B)
    m = hidden.sum(-1, keepdim=True)  # (N, K, L/B, 1)
    per_copy = (block_size / m * hidden * log_p).sum((-2, -1))  # (N, K)
    return per_copy.mean(-1)


# ==== §4  Noise ===================================================================================
# How wrong is that estimate, and how can one be rid of its noise? Say one of two tokens is certain,
# and the other has p = 0.01, log p = −4.6, whatever is visible. With the weight B/m, log π̂ of this
# block is
#     −4.6 if both are hidden (m = 2: one time in two),
#      0   if only the certain one is (m = 1: one time in four),
#     −9.2 if only the unlikely one is (m = 1: one time in four).
# That is right on average. But log π̂_θ and log π̂_old draw masks of their own, and may differ by 9.2
# though θ = θ_old: then ρ̂ = e^9.2 = 10,000 where ρ = 1.
#
# Let η be the noise of that difference: ρ̂ = ρ·e^η. If η is normal with standard deviation σ, then
# E[e^η] = e^(σ²/2): at σ = 2 nats, as on the base policies of this file, ratios are 7 times too
# large on average, and a few huge ones make that average. Bad completions are the noisy ones: they
# hold the tokens that the model found improbable, and such a token moves the estimate most.
#
# What lowers the noise?
#   * More copies: σ falls as 1/√K. Coupled copies (below) are better than independent ones.
#   * Shared masks (--shared_masks): both estimates of a ratio use the same masks. Where θ = θ_old
#     the ratio is then exactly 1, and later most of the error cancels. This takes an old estimate
#     for each of the μ updates, and the old weights at hand. The paper draws masks anew: it has one
#     old estimate per batch.
#   * Another ratio: `trajectory`, below, costs B copies and draws nothing.
#   * The exact likelihood. A block can be hidden in 2^B − 1 ways, 3 for B = 2. With a noisy copy
#     for each, one weighted sum of the log p is the ELBO without noise, and another is log π.


def coupled_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool in pairs (DiffuCoder, arXiv 2506.20639): in each block, copy K/2 + k hides just
    the tokens that copy k shows, so each token is hidden at least once. Where copy k hides all, its
    partner hides all as well. In the example above a pair always gives −4.6. Each copy alone is
    distributed as in `sample_masks`."""
    assert copies % 2 == 0, f"coupled masks come in pairs: copies must be even, not {copies}"
    first = sample_masks(num_seqs, copies // 2, completion_len, block_size, generator)
    blocks = first.unflatten(-1, (-1, block_size))  # (N, K/2, L/B, B)
    second = ~blocks | blocks.all(-1, keepdim=True)
    return torch.cat((first, second.flatten(-2)), dim=1)


def mean_field(model, prompts, completions, block_size, masks=None, steps=None):
    """The log-probability (N,) if each block were written in one step from blanks, its tokens
    independent of each other (d1, Zhao et al., arXiv 2504.12216). It has no noise, but a bias."""
    everything = torch.ones_like(completions, dtype=torch.bool)[:, None]  # (N, 1, L)
    return token_log_probs(model, prompts, completions, block_size, everything).sum((-2, -1))


def trajectory(model, prompts, completions, block_size, masks=None, steps=None):
    """log p(completion | prompt, order) in nats (N,), with the order that `generate` returned as
    steps (N,L): the product of the probabilities with which the tokens were written. Nothing is
    drawn, so the ratio is 1 at θ = θ_old. B copies. (TraceRL, Wang et al., arXiv 2509.06949.)

    The ratio is not ρ, but that of the pair of completion y and order o. It is a valid weight as
    well: E_old[π_θ(y,o)/π_old(y,o)·f(y,o)] = E_θ[f(y,o)]. The probability of the order, 1/B! per
    block, does not depend on θ, so it is left out. With f = A·∇log π_θ(y,o) this is again the
    gradient of the expected reward."""
    step = torch.arange(block_size, device=steps.device)[:, None]  # (B, 1)
    hidden = steps[:, None] >= step  # (N, B, L): copy k is the completion as it was before step k
    log_p = token_log_probs(model, prompts, completions, block_size, hidden)  # (N, B, L)
    return log_p.take_along_dim(steps[:, None], dim=1).sum((-2, -1))  # a token at its own step


MAX_EXACT_BLOCK = 6  # 2^6 − 1 = 63 copies are still affordable


def every_pattern(model, prompts, completions, block_size):
    """log p under every way to hide a part of a block: (2^B−1, B) bool patterns, (N, 2^B−1, L/B, B)
    log p. A pattern hides the same places in all blocks at once. That loses nothing: noisy blocks
    do not see each other."""
    B, L = block_size, completions.shape[1]
    check_lengths(B, prompts.shape[1], L)
    assert B <= MAX_EXACT_BLOCK, (
        f"exact likelihoods need 2^B - 1 copies: block_size {B} is above {MAX_EXACT_BLOCK}"
    )
    sets = torch.arange(1, 2**B, device=completions.device)  # place i is hidden if bit i is 1
    patterns = (sets[:, None] >> torch.arange(B, device=sets.device)) % 2 == 1  # (2^B−1, B)
    masks = patterns.repeat(1, L // B).expand(len(completions), -1, -1)  # (N, 2^B−1, L)
    log_p = token_log_probs(model, prompts, completions, B, masks)  # (N, 2^B−1, L)
    return patterns, log_p.unflatten(-1, (-1, B))


def exact_elbo(model, prompts, completions, block_size, masks=None, steps=None):
    """The mean of `elbo` over all masks that `sample_masks` may draw -> (N,): no noise."""
    patterns, log_p = every_pattern(model, prompts, completions, block_size)
    # count m has probability 1/B, then the pattern 1/C(B,m); times the ELBO's B/m: 1/(C(B,m)·m)
    weights = [1 / (math.comb(block_size, m) * m) for m in patterns.sum(-1).tolist()]
    weights = log_p.new_tensor(weights)[:, None] * patterns  # (2^B−1, B)
    return (weights[:, None] * log_p).sum((1, 2, 3))  # (2^B−1, 1, B) · (N, 2^B−1, L/B, B)


def exact_log_likelihood(model, prompts, completions, block_size, masks=None, steps=None):
    """log π(completion | prompt) in nats (N,), of `generate` with order="random" and temperature=1.
    Per block, reach[h] is the probability that the sampler gets to the state in which exactly the
    set h is hidden, and the rest is right. It comes from a state in which one more place i was
    hidden: it chose i, one of |h∪i| places, and wrote y_i there. So
        reach[h] = Σ_{i not in h} reach[h∪i] / |h∪i| · p(y_i while h∪i is hidden)
    For B = 2: π = ½ p(a) p(b|a) + ½ p(b) p(a|b). For B = 6 these are 192 terms, and there are 720
    orders, of 6 factors each."""
    _, log_p = every_pattern(model, prompts, completions, block_size)  # (N, 2^B−1, L/B, B)
    everything = 2**block_size - 1  # sets are integers: place i is hidden if bit i is 1
    log_reach = {everything: torch.zeros_like(log_p[:, 0, :, 0])}  # (N, L/B) each
    for hidden in range(everything - 1, -1, -1):  # a set with one bit more is a larger number
        terms = []
        for i in range(block_size):
            if hidden >> i & 1 == 0:  # i is not in the set: it is the one that was written
                before = hidden + 2**i  # the set with i in it
                write_token = log_p[:, before - 1, :, i]  # (N, L/B); set s is row s−1
                terms.append(log_reach[before] + write_token - math.log(before.bit_count()))
        log_reach[hidden] = torch.stack(terms).logsumexp(0)
    return log_reach[0].sum(-1)


# --masks: name -> function(num_seqs, copies, completion_len, block_size, generator) -> (N,K,L).
MASKS = {"independent": sample_masks, "coupled": coupled_masks}

# --estimator: name -> function(model, prompts, completions, block_size, masks, steps) -> (N,).
ESTIMATORS = {
    "elbo": elbo,
    "trajectory": trajectory,
    "mean_field": mean_field,
    "exact_elbo": exact_elbo,
    "exact": exact_log_likelihood,
}

# ==== §5  Losses ==================================================================================
# What do GRPO and StableDRL make of it? Let g be the gradient of log π̂_θ(y) with respect to θ. All
# losses here have the gradient −Σ weight·A·g / divisor, and differ in weight and divisor:
#     weight        GRPO, A > 0    GRPO, A < 0           StableDRL, any A
#     ρ̂ < 1−ε       ρ̂              0                     1−ε (cannot happen if ε ≥ 1)
#     in between    ρ̂              ρ̂                     ρ̂
#     ρ̂ > 1+ε       0              ρ̂, however large      1+ε
#     divisor       N              N                     Σ of the group's weights · number of groups
# GRPO leaves one case without a bound, the *open case*: a bad completion with a large ratio. With
# an exact ratio that is right, since a bad completion that has become likelier must be pulled back
# hard. With an estimate, ρ̂ = 1,000 mostly says that the noise was 6.9 nats.
#
# Where every ρ̂ is 1 all losses agree: their gradient is −mean A·g, so that a descent step raises
# Σ A·log π̂. Their *value* is 0 there, since Σ A = 0 or log ρ̂ = 0. That is no bug: the value of these
# losses means nothing, and only their gradient is used.
#
# Why not a ratio per token, as in a GPT? A term of log π̂ is the log-probability of a token given
# what its mask leaves visible, times B/m. The terms of log π̂_θ and log π̂_old have other masks, so
# the exp of their difference is not the ratio of two probabilities of one event.


def group_advantages(rewards, group_size):
    """Rewards (N,), floats, whole numbers or bools -> (N,) float: (reward − mean of its group) /
    (standard deviation of its group). Equal rewards give exactly 0: such a group teaches nothing.
    (If a prompt is solved with probability p, this happens with probability p^G + (1−p)^G.)

    Is mean A·g the gradient of the expected reward? But for two habits of GRPO: the mean of the
    group contains the completion's own reward, which costs a factor 1 − 1/G; and the division gives
    more weight to prompts that are nearly always or nearly never solved. (And g must be the
    gradient of log π: that of the ELBO, a lower bound, is a little off.)"""
    check_batch(group_size, rewards)
    groups = (rewards * 1.0).view(-1, group_size)  # (M, G); times 1.0: never whole numbers
    groups = groups - groups[:, :1]  # so that equal rewards give 0, not a rounding error
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = groups.std(-1, correction=0, keepdim=True)
    return (centred / (deviation + 1e-6)).flatten()  # `centred.flatten()` leaves the division out


def check_batch(group_size, *tensors):
    """AssertionError unless all tensors are (N,), with the same N, a multiple of group_size. (A
    column beside a row would broadcast to (N, N), silently.)"""
    N = tensors[0].numel()
    for tensor in tensors:
        assert tensor.shape == (N,), f"shape must be (N,) = ({N},), not {list(tensor.shape)}"
    assert N % group_size == 0, f"{N} completions are not a multiple of group_size {group_size}"


def safe_exp(log_ratio):
    """exp of log_ratio (N,), as float32 ends at e^88. Above 80, value and gradient are those at 80;
    a clamp would make the gradient 0."""
    overflow = (log_ratio - 80).clamp(min=0).detach()
    return (log_ratio - overflow).exp()


def grpo_loss(log_ratio, advantages, clip_eps, group_size=1):
    """GRPO without KL term (Shao et al., arXiv 2402.03300), with one ratio per completion:
    log_ratio (N,), advantages (N,) -> scalar, −mean min(ρ̂·A, clip(ρ̂)·A). group_size is not used.

    ρ̂ = exp(log π̂_θ − log π̂_old) has the gradient ρ̂·g. Where the min is its first term, its gradient
    is ρ̂·A·g. Where it is the second and the clip binds, it is constant: gradient 0. Say ε = 0.2 and
    ρ̂ = 1,000. For A = 1 it is min(1000, 1.2), with gradient 0. For A = −1 it is min(−1000, −1.2),
    with gradient −1000·g."""
    check_batch(group_size, log_ratio, advantages)
    ratio = safe_exp(log_ratio)  # (N,)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # counts only where it lowers the objective
    per_sequence = torch.minimum(ratio * advantages, clipped * advantages)
    return -(per_sequence / len(per_sequence)).sum()  # the mean, whose sum cannot overflow


def stabledrl_loss(log_ratio, advantages, clip_eps, group_size):
    """StableDRL: log_ratio (N,), advantages (N,) -> scalar, the mean over groups. Its negative
    gradient is, for a group,  Σ_j w_j A_j g_j / Σ_j w_j  with  w_j = clip(ρ̂_j, 1−ε, 1+ε). The
    weights are constants: they say how much a completion counts, and are not to be optimised.

    What does it gain? The update of a group is a weighted mean of its A_j·g_j, so its norm is at
    most max_j |A_j|·‖g_j‖, whatever the ratios are. `train` clips the norm of the gradient anyway,
    and Adam rescales it. But no clipping of a norm mends a *direction*, and the weights decide which
    completions it comes from. Beside seven completions of ratio 1, a noisy one has at most
    (1+ε)/(1+ε+7) = 6/13 of its group's weight. Without line 1 it may have all of it, and without
    line 2 groups with large ratios outweigh the others.

    What does it give up? There is no 0 in its column of the table. In GRPO, once the updates of a
    batch have moved a completion by more than ε in the intended direction, its weight becomes 0, and
    it is left alone. StableDRL goes on moving it. So ε means two things: that of GRPO (0.2) is a
    *trust region*, and that of StableDRL (5) cuts a long tail."""
    check_batch(group_size, log_ratio, advantages)
    log_lower = math.log(1 - clip_eps) if clip_eps < 1 else -math.inf
    clipped = log_ratio.detach().clamp(log_lower, math.log(1 + clip_eps))  # line 1: always clip
    weights = clipped.view(-1, group_size).softmax(-1).flatten()  # line 2: w_j / Σ w, from log w
    per_sequence = weights * advantages * log_ratio
    return -per_sequence.view(-1, group_size).sum(-1).mean()


def clip_only_loss(log_ratio, advantages, clip_eps, group_size):
    """StableDRL without line 2: weight clip(ρ̂), divisor N. (CISPO, arXiv 2506.13585, is the same
    with bounds of its own.)"""
    check_batch(group_size, log_ratio, advantages)
    weights = safe_exp(log_ratio.detach()).clamp(1 - clip_eps, 1 + clip_eps)
    return -(weights * advantages * log_ratio).mean()


# --loss: name -> (function(log_ratio, advantages, clip_eps, group_size) -> scalar, its default ε).
LOSSES = {
    "grpo": (grpo_loss, 0.2),
    "stabledrl": (stabledrl_loss, 5.0),
    "clip_only": (clip_only_loss, 5.0),  # without line 2
    "norm_only": (stabledrl_loss, 1e30),  # without line 1: hardly any ρ̂ reaches this ε
    "no_ratio": (stabledrl_loss, 0.0),  # every ratio is clipped to 1
}

# ==== §6  Training ================================================================================
# How does it all run? `one_batch` is the algorithm: the policy completes prompts, the task judges,
# and μ updates learn from that. `train` repeats it and measures. With μ = 1 every true ratio is 1,
# so an estimated one is nothing but noise, and is best left out (no_ratio).
#
# Prompts, samples and masks each have a random stream of their own, made from the seed and the
# number of updates done. So all losses with one seed start from the same base policy and see the
# same prompts, whatever else they draw; and a run that is resumed draws what it would have drawn.


@dataclasses.dataclass
class Config:
    """The settings of a run. Each is a flag; several values of a flag mean a run for each."""

    # The base policy: all settings down to base_lr name its file.
    task: str = "addition"
    seed: int = 0  # every seed has a base policy and random numbers of its own
    block_size: int = None  # B, tokens per block; None: the task's own
    d_model: int = 64  # width of the transformer
    n_layer: int = 2  # its layers
    n_head: int = 4  # its attention heads per layer
    base_accuracy: float = 0.4  # pretraining stops at this accuracy, so that RL has work left
    base_lr: float = 1e-3  # learning rate of pretraining; larger models need a smaller one
    # Reinforcement learning.
    loss: str = "stabledrl"  # section 5; without --loss and --estimator: grpo and stabledrl,
    estimator: str = "elbo"  # each with elbo and exact (sections 3 and 4)
    masks: str = "independent"  # or coupled, section 4
    shared_masks: bool = False  # both estimates of a ratio use the same masks, section 4
    copies: int = 1  # K, noisy copies behind one estimate
    clip_eps: float = None  # epsilon of the clip; None: the loss's own, section 5
    lr: float = 1e-4  # learning rate of RL
    prompts: int = 32  # prompts per batch of completions
    group_size: int = 8  # G, completions per prompt
    mu: int = 2  # updates per batch of completions
    max_grad_norm: float = 1.0  # the norm of the gradient is clipped to this; 1e9 means never
    log_every: int = 40  # updates per line of the log
    updates: int = 600  # updates of a run, in all
    device: str = "cpu"  # or cuda, mps

    def __post_init__(self):
        """AssertionError for a value that cannot be."""
        if not __debug__:
            raise RuntimeError("python -O removes all checks: run python without it")
        for name, choices in CHOICES.items():
            assert getattr(self, name) in choices, f"--{name} is one of {', '.join(choices)}"
        if self.block_size is None:
            self.block_size = TASKS[self.task].block_size
        if self.clip_eps is None:
            self.clip_eps = LOSSES[self.loss][1]
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            if kind is not str:
                least = LEAST.get(name, int(kind is int))
                must = f"--{name} must be a finite {kind.__name__}, and at least {least}"
                assert isinstance(value, (int, float)) and least <= value < math.inf, must
                assert kind(value) == value, must
                setattr(self, name, kind(value))  # so that 1, 1.0 and True make one run
        assert self.base_accuracy <= 1, "--base_accuracy must be at most 1"
        assert self.log_every % self.mu == 0, "--log_every must be a multiple of --mu"
        assert self.updates % self.log_every == 0, "--updates must be a multiple of --log_every"


CHOICES = {"task": TASKS, "loss": LOSSES, "estimator": ESTIMATORS, "masks": MASKS}
LEAST = {"seed": 0, "group_size": 2, "max_grad_norm": 1e-9}  # others: 1 if whole numbers, else 0


def stream(config, purpose):
    """A random generator for one purpose, by the run's seed: nothing else draws from it."""
    seed = random.Random(f"{config.seed} {purpose}").getrandbits(63)
    return torch.Generator(config.device).manual_seed(seed)


def new_model(config):
    """An untrained model on config.device, by config.seed."""
    torch.manual_seed(config.seed)
    vocab_size = len(TASKS[config.task].vocab) + 1
    model = BlockDiffusionTransformer(vocab_size, config.d_model, config.n_layer, config.n_head)
    return model.to(config.device)


def answer(model, task, texts, block_size, **options):
    """The model completes M prompts (strings), options as in `generate`, and the task judges ->
    (batch, rewards (N,)). batch has all that an estimate needs beside model and masks: prompts
    (M,P), completions (N,L), their steps (N,L) and block_size."""
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


def evaluate(model, task, block_size):
    """500 held-out prompts, always the same, completed greedily, surest place first -> dict.
    accuracy: the share that is right; writes: the first three, as text."""
    texts, _ = task.sample(np.random.default_rng(0), 500, "test")
    batch, rewards = answer(model, task, texts, block_size, temperature=0, order="confidence")
    right = (rewards == 1).tolist()  # some tasks give less than 1 for less than right
    writes = []
    for prompt, completion, is_right in zip(texts, decode(task, batch["completions"][:3]), right):
        writes.append(f"{prompt}{completion} {'right' if is_right else 'wrong'}")
    return {"accuracy": sum(right) / 500, "writes": writes}


def pretrain(config):
    """A policy for RL to start from: maximise the ELBO of right completions until the accuracy is
    base_accuracy. TimeoutError if 2,000 updates do not suffice."""
    task, B = TASKS[config.task], config.block_size
    model = new_model(config)
    optimizer = torch.optim.Adam(model.parameters(), config.base_lr)
    rng = np.random.default_rng([config.seed, 0])  # 0: not the prompts of RL
    masking = stream(config, "pretrain")
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


def one_batch(config, model, optimizer, done, truths=None):
    """The algorithm: `done` updates have been made, and this makes the next μ -> batch, rewards
    (N,), and of each update log ρ̂ (N,) and the norm of the gradient before it is clipped. The list
    `truths`, if there is one, gets log π (N,) of the policy at each update. FloatingPointError for
    an update that is not finite: it is not made."""
    task, B, G = TASKS[config.task], config.block_size, config.group_size
    estimate, draw_masks = ESTIMATORS[config.estimator], MASKS[config.masks]
    loss_function, _ = LOSSES[config.loss]
    mask_shape = (config.prompts * G, config.copies, task.completion_len)  # (N, K, L)
    masking = stream(config, f"masks {done}")
    torch.manual_seed(stream(config, f"yours {done}").initial_seed())  # if a loss of yours draws

    # (1) The old policy completes each prompt G times, and the task judges.
    texts, _ = task.sample(np.random.default_rng([config.seed, 1, done]), config.prompts, "train")
    sampling = stream(config, f"samples {done}")
    batch, rewards = answer(model, task, texts, B, samples=G, generator=sampling)
    advantages = group_advantages(rewards, G)  # (N,)

    # (2) The old policy scores its own completions: log π̂_old. It does so once, with masks that no
    # update uses; or, if masks are shared, for each update with the masks of that update.
    draw = functools.partial(draw_masks, *mask_shape, B, masking)
    with torch.no_grad():
        if config.shared_masks:
            masks_of_updates = [draw() for _ in range(config.mu)]
            old_log_probs = [estimate(model, masks=m, **batch) for m in masks_of_updates]
        else:
            old_log_probs = [estimate(model, masks=draw(), **batch)] * config.mu
            masks_of_updates = [draw() for _ in range(config.mu)]

    # (3) μ updates learn from it: log π̂_θ, the ratio, the loss, a step of the optimiser.
    log_ratios, grad_norms = [], []
    for masks, old_log_prob in zip(masks_of_updates, old_log_probs):
        log_prob = estimate(model, masks=masks, **batch)  # (N,)
        log_ratio = log_prob - old_log_prob  # log ρ̂
        loss = loss_function(log_ratio, advantages, config.clip_eps, G)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not (loss + grad_norm + log_ratio.sum()).isfinite():
            raise FloatingPointError(
                f"update {done + len(log_ratios) + 1} was not made: loss {loss:.3g}, "
                f"gradient norm {grad_norm:.3g}"
            )
        if truths is not None:
            truths.append(true_log_prob(model, **batch))
        optimizer.step()
        log_ratios.append(log_ratio.detach())
        grad_norms.append(grad_norm.item())
    return batch, rewards, log_ratios, grad_norms


# What is logged. The best sign of trouble to come is `spread`, the standard deviation of log ρ̂ at
# the first update of a batch: every true ratio is 1 there, so whatever it shows is noise, and a
# model of any size can log it. (With shared masks it is 0, and says nothing.)


def ratio_diagnostics(log_ratio, clip_eps, group_size):
    """log_ratio (N,) -> dict of floats, about ratios before any clipping. ratio_max: the largest
    ρ̂. clip_fraction: the share of ρ̂ outside [1−ε, 1+ε], clipped by the loss or not. ess:
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


# log π for the log. Without gradients: otherwise torch would keep all 2^B − 1 copies in memory.
true_log_prob = torch.no_grad()(exact_log_likelihood)


def first_checkpoint(config, base_model):
    """The checkpoint of update 0, and its row of the log: the reward of 2,000 completions of
    training prompts, and what `evaluate` finds."""
    task, B = TASKS[config.task], config.block_size
    texts, _ = task.sample(np.random.default_rng(1), 2_000, "train")
    _, rewards = answer(base_model, task, texts, B, generator=stream(config, "base"))
    row = {"update": 0, "reward": rewards.mean().item()} | evaluate(base_model, task, B)
    return {"model": base_model.state_dict(), "optimizer": None, "rows": [row]}


def train(config, base_model, checkpoint=None):
    """RL from the base policy, or from a checkpoint on: yields a checkpoint whenever a row of the
    log is due, a dict of `model` and `optimizer` (states) and `rows` (dicts) so far. It touches no
    file. Errors: see `one_batch`, `generate`."""
    task, B = TASKS[config.task], config.block_size
    model = copy.deepcopy(base_model)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas=(0.9, 0.99))  # the authors'
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
        recent["spread"].append(log_ratios[0].std(correction=0).item())
        for log_ratio in log_ratios:
            ratios = ratio_diagnostics(log_ratio, config.clip_eps, config.group_size)
            for name, number in ratios.items():
                recent[name].append(number)
        if row_is_due:
            row = {"update": done + config.mu} | evaluate(model, task, B)
            for name, numbers in recent.items():  # of all updates since the row before
                row[name] = sum(numbers) / len(numbers)
            row["ratio_max"] = max(recent["ratio_max"])
            if truths:  # at the last update of the batch: how far is log ρ̂ from log ρ?
                noise = log_ratios[-1] - (truths[-1] - truths[0])
                drift = truths[0] - true_log_prob(base_model, **batch)  # its mean estimates the KL
                row["noise_std"] = noise.std(correction=0).item()
                row["drift"] = drift.mean().item()
            row["seconds"] = time.perf_counter() - began
            rows.append(row)
            recent.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
            yield copy.deepcopy(state)  # so that it stays what it is when training goes on


# ==== §7  Command line ============================================================================
# Nothing here belongs to the method: files, flags, processes, a table and a figure. `train` yields
# checkpoints, and `run` writes them down. A run that goes on is `train` with its last checkpoint.

SQUARE = {"loss": ["grpo", "stabledrl"], "estimator": ["elbo", "exact"]}  # where neither is given
SETTINGS = [field.name for field in dataclasses.fields(Config)]
BASE = SETTINGS[: SETTINGS.index("loss")]  # the settings of the base policy
UNNAMED = ("seed", "estimator", "updates", "device")  # in a run's name anyway, or not at all
PANELS = {"reward": "reward", "ratio_max": "largest ratio", "grad_norm": "gradient norm"}
COLOURS = "tab:red tab:orange tab:blue tab:cyan tab:green tab:purple tab:brown tab:pink gold black"


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
    """Logits for a fixed text: weights read into another architecture would give others."""
    tokens = torch.arange(model.mask_id, device=model.embed.weight.device)
    with torch.no_grad():
        return model(tokens[None], tokens, block_causal_mask(len(tokens), 2, tokens.device)).cpu()


def save(path, model, state):
    """Write a checkpoint. The file gets its name when it is whole: a kill meanwhile leaves the old
    one, and two programs do not interfere."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state | {"probe": probe(model)}, unfinished)
    os.replace(unfinished, path)


def load(path, model):
    """Read the weights into the model -> the checkpoint. ValueError if that cannot be."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no foreign code
        model.load_state_dict(state["model"])
        if torch.allclose(probe(model), state["probe"], atol=1e-3):
            return state
        reason = "another architecture wrote it"
    except (RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error)[:200]
    raise ValueError(f"{path} cannot be used: {reason}. Delete it or choose another --out")


def load_start(out, config):
    """-> the base policy, its checkpoint, and the checkpoint to go on from."""
    base_model, path = new_model(config), Path(out, run_name(config), "checkpoint.pt")
    base = checkpoint = load(base_path(config, out), base_model)
    if path.exists():
        checkpoint = load(path, new_model(config))
        same_base = torch.equal(checkpoint["base"], base["probe"])
        assert same_base, f"{path} began from another base policy: choose another --out"
    made = checkpoint["rows"][-1]["update"]
    assert made <= config.updates, f"--updates {config.updates}: {path.parent} has {made} already"
    return base_model, base, checkpoint


def trial(out, resume, config):
    """One batch of one prompt on an untrained model, and a look at the files that exist: what
    cannot work ends here, before any work."""
    folder = Path(out, run_name(config))
    assert resume or not folder.exists(), f"{folder} exists: --resume, or another --out"
    if base_path(config, out).exists():
        load_start(out, config)
    small = dataclasses.replace(config, prompts=1, log_every=config.mu, updates=config.mu)
    model = new_model(config)
    start = {"model": model.state_dict(), "optimizer": None, "rows": [{"update": 0}]}
    next(train(small, model, start))


def make_base(out, config):
    """Pretrain the base policy, if its file does not exist."""
    if not base_path(config, out).exists():
        model = pretrain(config)
        save(base_path(config, out), model, first_checkpoint(config, model))


def run(out, config):
    """Train, or go on -> rows of the log, and whether the run failed. The log is written before the
    checkpoint: a kill in between makes its last row once more."""
    base_model, base, checkpoint = load_start(out, config)
    folder, model = Path(out, run_name(config)), new_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for checkpoint in itertools.chain([checkpoint], train(config, base_model, checkpoint)):
            rows = checkpoint["rows"]
            lines = [json.dumps(line) + "\n" for line in [vars(config), *rows]]
            (folder / "log.jsonl").write_text("".join(lines))
            model.load_state_dict(checkpoint["model"])
            save(folder / "checkpoint.pt", model, checkpoint | {"base": base["probe"]})
            numbers = "update {update}  reward {reward:.3f}".format(**rows[-1])
            print(f"{run_name(config)}  {numbers}", flush=True)
    except FloatingPointError as error:  # an outcome, and no mistake
        print(f"{run_name(config)} FAILED: {error}", flush=True)
        return rows, True
    return rows, False


def attempt(work, out, config):
    """work(out, config), or None if an error ends it. The other runs go on."""
    try:
        return work(out, config)
    except (OSError, torch.OutOfMemoryError) as error:
        print(f"{run_name(config)} FAILED: {error}", flush=True)
    except Exception:  # of any kind, in a loss or a task of your own: so with its place
        print(f"{run_name(config)} FAILED: {traceback.format_exc()}", flush=True)


def start_worker():
    """What a process does first: die quietly on Ctrl-C, and with the program, even by kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the signal if the parent dies
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(work, configs, fork):
    """[work(config) for each], in forked processes as many at a time as the cores allow, or here.
    The process that forks must never have run a backward pass: where torch sees a GPU, autograd
    does not survive it."""
    if not fork:
        return [work(config) for config in configs]
    jobs = max(1, len(os.sched_getaffinity(0)) // torch.get_num_threads())
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
        kind, least = (int, "*") if field.type is bool else (field.type, "+")
        parser.add_argument(f"--{field.name}", type=kind, nargs=least, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    out, resume = given.pop("out"), given.pop("resume")
    if not given.keys() & SQUARE.keys():
        given |= SQUARE
    configs = {}
    for values in itertools.product(*[values or [1] for values in given.values()]):
        config = Config(**dict(zip(given, values)))
        same = configs.setdefault(run_name(config), config) == config
        assert same, f"{run_name(config)} cannot have two values of --updates or --device"
    return list(configs.values()), out, resume


def over_seeds(numbers, digits):
    """Mean ± standard deviation, as text."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def table(policies):
    """Lines of text: label -> (rows of the log, failed) of each seed, behind their base policy. A
    run that failed counts as 0."""
    width = max(map(len, ["base policy", *policies]))
    lines = [f"{'':{width}}  {'reward':15} {'accuracy':15} {'x base':13} the first seed writes"]
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
            if line not in lines:  # a base policy stands there once
                lines.append(line)
    return lines


def plot(policies, path):
    """A panel for each of PANELS (column of the log: title). Seeds are thin, and their mean is
    thick, as far as all of them go. A cross marks the end of a run that failed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 + 0.1 * len(policies)), layout="constrained")
    axes, colours = figure.subplots(1, len(PANELS)), COLOURS.split()
    for axis, (column, title) in zip(axes, PANELS.items()):
        scale, absent = ("linear", 0) if column == "reward" else ("log", math.nan)  # no log of 0
        axis.set(title=title, xlabel="update", yscale=scale)
        for i, (label, seeds) in enumerate(policies.items()):
            style = {"color": colours[i % 10], "linestyle": ("-", "--", ":")[i // 10 % 3]}
            lines = []
            for rows, failed in seeds:
                updates = [row["update"] for row in rows]
                lines.append([row.get(column) or absent for row in rows])
                mark = "x" if failed else ""
                axis.plot(updates, lines[-1], marker=mark, markevery=[-1], linewidth=0.6, **style)
            mean = [statistics.mean(numbers) for numbers in zip(*lines)]  # ends with the shortest
            if column == "reward":
                base = {"color": "grey", "linestyle": ":", "label": "" if i else "base policy"}
                axis.axhline(mean[0], **base)
            axis.plot(updates[: len(mean)], mean, linewidth=2, label=label, **style)
    axes[0].set_ylim(0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path)


def main(argv=None):
    """Run what the command line asks for. Status 2 for bad input, 1 if a run failed."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # so that a run's log is the same alone and in company
    try:
        configs, out, resume = parse(argv)
        fork = len(configs) > 1 and sys.platform == "linux" and configs[0].device == "cpu"
        launch(functools.partial(trial, out, resume), configs, fork)
        Path(out).mkdir(parents=True, exist_ok=True)
        assert os.access(out, os.W_OK), f"--out {out} cannot be written"
    except (AssertionError, ValueError, OSError, RuntimeError, FloatingPointError) as error:
        refuse(error)
    bases = {base_path(config, out): config for config in configs}
    launch(functools.partial(attempt, make_base, out), bases.values(), fork)
    ready = [config for config in configs if base_path(config, out).exists()]
    results = launch(functools.partial(attempt, run, out), ready, fork)
    policies = collections.defaultdict(list)  # label -> (rows, failed) of each seed
    for config, result in zip(ready, results):
        if result:
            policies[", ".join(policy_words(config))].append(result)
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
    except BrokenExecutor as error:  # somebody, or the system out of memory, has killed a worker
        sys.exit(f"stabledrl.py: {error} The same command with --resume goes on.")
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from the last lines", flush=True)
        os._exit(1)  # and all processes with it
