"""StableDRL in one file: reinforcement learning for diffusion language models that survives the
noise on which GRPO collapses.

Source: Zhong et al., Stabilizing Reinforcement Learning for Diffusion Language Models, arXiv
2603.06743. The paper reasons about noise in estimates of the likelihood. The toy tasks here have
blocks so short that the exact likelihood can be computed. So the noise can be measured, and
switched off.

What a diffusion language model is. A GPT predicts the next token from those before it. A diffusion
language model predicts *hidden* tokens from visible ones: it learns to fill in blanks. It writes by
starting from blanks and filling them in, one by one, in random order. A *block*-diffusion model
writes block after block, left to right, and only within a block of B tokens is the order free. With
B = 1 nothing is free, and the model factorises like a GPT. With B = L, the length of the answer,
the whole answer is one block. B must always divide both the length of the prompt and that of the
answer.

How rewards train it. The model, seen as a writer of answers, is a *policy* π_θ with weights θ. It
answers each prompt G times; these G *completions* are a *group*. A judge gives each a reward. Its
*advantage* A says how much better it did than its group. Gradient ascent on Σ A·log π_θ(completion)
makes the better ones likelier. It raises the expected reward as long as π_θ is the policy that
wrote the completions, π_old. (The reason is REINFORCE: the gradient of E[reward] is
E[reward·∇log π_θ]. A number that does not depend on the completion may be subtracted from the
reward, since E[∇log π_θ] = 0.) After one step π_θ is another policy. To use the completions for
several steps, PPO and GRPO weigh them by the *importance ratio* ρ = π_θ/π_old. (A GPT has a ratio
per token, this model one per completion.) The reason is importance sampling: E_old[ρ·f] = E_θ[f]
for any f, so weighted samples of the old policy average like samples of the new one. With f =
A·∇log π_θ this is the gradient above. At the first step θ is θ_old, and every ρ is 1.

Why GRPO breaks on such a model:
  1. The order within a block is random, so the probability of a block is a mean over B! orders.
     Even the exact method of §5 needs 2^B − 1 copies of the completion, and a real model has
     B = 32. So instead of log π one computes a random *estimate* L̂ (§3): hide m random tokens of
     each block (m uniform on 1..B), sum the log-probabilities that the model gives to them, and
     multiply by B/m.
     Instead of ρ one has the estimate ρ̂ = exp(L̂_θ − L̂_old). Both L̂ draw random numbers of their
     own.
  2. exp magnifies the noise. A completion whose ρ is 1 may get a ρ̂ of 10,000 (§5).
  3. GRPO clips ρ̂ to [1−ε, 1+ε], but only where that lowers its objective, min(ρ̂·A, clip(ρ̂)·A)
     (§6). With ρ̂ = 10,000 a good completion (A > 0) gets weight 0, and a bad one (A < 0) gets
     weight 10,000. So almost all of an update goes into making a few bad completions less likely,
     those with the most noise.
  4. Updates that only push completions down destroy a policy. The gradient of log p with respect
     to the logits vanishes as p goes to 1, so pushing up stops by itself. It does not vanish as p
     goes to 0, so pushing down never stops. And all completions share θ, so each push moves the
     good ones, too. (The results page in .github/results shows that this happens without any
     ratio, and under the same clip of the gradient's norm.)
StableDRL (§6) is two lines: clip every ratio, whatever the sign of A; then divide the ratios of a
group by their sum, so that they add up to 1.

Three things that you will not find in the paper follow from this file's measurements. The noise can
be removed: where both estimates use the same masks, or follow the order in which the completion was
written, the ratio has little noise or none, and GRPO works (§5). Where each batch is used for only
two updates, leaving a noisy ratio out does better than StableDRL with the paper's ε. And of all
objectives that we tried on noisy estimates of this task, the simplest did best: to learn from the
good completions only, without a ratio. (The README has the numbers.)

Where to look: §6 is the paper; `train` in §8 is the loop, in four numbered steps.
  §1 Transformer                 §4 Rollout                §7 Diagnostics
  §2 Attention masks             §5 Exact likelihoods      §8 Training
  §3 Forward process and ELBO    §6 The losses             §9 Command line

Notation: symbol, name in the code, shape, meaning. A hat marks an estimate. (But L is a length, and
L̂ an estimate of log π.) An *answer* is a completion, a *place* a position within it.
  q      prompts      (M, P)     M prompts of P tokens; in the toy task of addition, "12+34="
  y      completions  (N, L)     N = M·G, of L tokens, "46.."; rows i·G .. i·G+G−1 answer prompt i
  B      block_size              tokens per block; P and L are multiples of B. B = 2: "46", ".."
  G      group_size              completions per prompt
  K      copies                  copies of y with random tokens hidden ("noisy copies") per estimate
         masks        (N, K, L)  True where a copy has the token [MASK] in place of its own. (The
                                 attention masks of §2 are another thing: who may look at whom)
         steps        (N, L)     at which step of its block, 0..B−1, a place was written
  L̂_θ    log_prob     (N,)       estimate of log π_θ(y|q) in nats (natural logarithm)
  log ρ̂  log_ratio    (N,)       L̂_θ − L̂_old: one number per completion, not one per token
  A      advantages   (N,)       reward relative to the group
  ε      clip_eps                ratios are clipped to [1−ε, 1+ε]
  μ      mu                      optimiser steps ("updates") that use one batch of completions
"""

import argparse
import collections
import copy
import ctypes
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
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

# A task makes prompts and judges answers, as strings: toy_tasks/__init__.py lists its parts.
from toy_tasks import TASKS, decode, encode

# ==== §1  Transformer =============================================================================
# Nothing in this section is diffusion. It is an ordinary transformer that is told who may look at
# whom, by an attention mask. Under a causal mask, and with targets shifted by one, it would be a
# GPT. Under the masks of §2 it is a block-diffusion model. Three details matter later:
#   * Positions are an argument, so a noisy copy can use the positions of its original.
#   * [MASK] can be an input but never a prediction.
#   * `read` returns the keys and values of what it has read, the *cache*. A later `read` may go on
#     from there, so the sampler of §4 reads a finished block once.
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
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x, rotation, mask, cache):
        """x (N,S,d_model), mask (S,T), cache (2,M,H,T−S,D) or None -> (N,S,d_model), and the keys
        and values of all T tokens, the new cache (2,N,H,T,D)."""
        qkv = self.qkv(self.norm1(x))  # (N, S, 3·d_model)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1))  # (N, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, S, D)
        keys_values = torch.stack((rotate(k, rotation), v))  # (2, N, H, S, D)
        if cache is not None:
            samples = len(x) // cache.shape[1]  # completions per prompt; 1 where each has a cache
            cache = cache.repeat_interleave(samples, dim=1)  # (2, N, H, T−S, D)
            keys_values = torch.cat((cache, keys_values), dim=3)  # (2, N, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, rotation), *keys_values, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), keys_values

class BlockDiffusionTransformer(nn.Module):
    """Predicts every token at its own place (no shift by one) from whatever the mask lets it see.
    vocab_size counts [MASK], the last id. AssertionError unless 2·n_head divides d_model."""
    def __init__(self, vocab_size, d_model=64, n_layer=2, n_head=4):
        super().__init__()
        assert d_model % (2 * n_head) == 0, (
            f"d_model {d_model} is not a multiple of 2*{n_head} heads")
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

# ==== §2  Attention masks =========================================================================
# One pass scores all blocks. Each is given the true text before it, and none sees the tokens that
# are hidden from it. To score block b the model must read two things: the clean tokens before b
# (nothing hidden), and a noisy copy of b. The *staircase* does that for all blocks at once, since
# the completion is laid out once clean and K times noisy, each time with other tokens hidden. The
# clean part serves as the text before each block. Predictions are read at the noisy copies. A noisy
# token may look at its own noisy block, and at clean blocks *strictly before* its own. With >= in
# place of that one > it would see the very tokens that are hidden from it, and learn to copy them.
#
# Blocks are counted from the first token of the prompt. So the prompt must end where a block ends.
# Otherwise one block would hold its last tokens and the first ones of the completion, and the
# blocks of training would not be those that the sampler writes.

def check_lengths(block_size, *lengths):
    """AssertionError unless all are multiples of block_size."""
    for length in lengths:
        assert length % block_size == 0, (
            f"lengths {lengths} must be multiples of block_size {block_size}")

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

def staircase_positions(prompt_len, completion_len, copies=1, device=None):
    """(S,) long, S = P + L + K·L: noisy copies reuse the positions P..P+L−1 of the completion."""
    clean = torch.arange(prompt_len + completion_len, device=device)  # (P + L,)
    return torch.cat((clean, clean[prompt_len:].repeat(copies)))

def staircase_mask(prompt_len, completion_len, block_size, copies=1, device=None):
    """(S,S) bool, True = the row may look at the column, for [prompt | clean completion | noisy
    copy 1 | .. | noisy copy K], S = P + L + K·L. AssertionError if P or L is not a multiple of B.
    Source: the paper's staircase attention, with the algebra of BD3-LM's mask (Arriola et al. 2025)
    and a prompt that is never noisy. The prompt is read block by block, like all clean text. For
    P = 4, L = 4, B = 2, K = 2:
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

# ==== §3  Forward process and ELBO ================================================================
# One quantity, the ELBO, serves twice. Pretraining maximises a random estimate of it, and RL uses
# the same estimate, L̂, for log π. The *forward process* of diffusion destroys a text, which here
# means that it hides tokens. In every block it draws a count m uniformly from 1..B, and puts [MASK]
# in place of m random tokens. The model predicts these. What does that have to do with the
# probability of *writing* a block? (One block is enough for the argument: the log-probability of a
# completion is the sum over its blocks.)
#   1. The model writes the B tokens one per step, in an order chosen at random (§4):
#          π(block) = mean over all B! orders of  ∏ over the B steps of  p(token | what is visible)
#   2. The log of a mean is at least the mean of the logs (Jensen's inequality):
#          log π(block) ≥ mean over orders of  Σ over steps of  log p
#                       = B · (mean of log p over a random step of a random order)
#   3. A prediction depends on which tokens are visible, not on the order in which they were
#      written. So a random step of a random order can be drawn in a simpler way. When such a step
#      begins, m tokens are hidden, and m is uniform on 1..B. In a random order every set of m
#      tokens is equally likely to be the hidden one, and each of its tokens equally likely to be
#      written next. So the mean in 2. is a mean over m, and over sets of m tokens, of
#      (1/m)·Σ_hidden log p. (For B = 2: with probability 1/2 both are hidden, with 1/4 the first
#      alone, with 1/4 the second alone.) Times B, and summed over blocks, this is
#   ELBO(y) = E_masks[ Σ_blocks B/m · Σ_{i hidden} log p_θ(y_i | noisy block, clean text before) ]
# This *evidence lower bound* is at most log π_θ(y). L̂ is the mean of the bracket over K random
# masks, and `elbo` computes it. (BD3-LM hides each token with a probability t, uniform on (0, 1),
# and divides by t. Its mean is this ELBO.)

def sample_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool, True = hidden: in each block m ~ U{1..B} random places, on the generator's
    device. AssertionError if completion_len is not a multiple of block_size."""
    check_lengths(block_size, completion_len)
    shape, device = (num_seqs, copies, completion_len // block_size), generator.device
    m = torch.randint(1, block_size + 1, (*shape, 1), generator=generator, device=device)
    uniform = torch.rand(*shape, block_size, generator=generator, device=device)  # (N, K, L/B, B)
    rank = uniform.argsort(-1).argsort(-1)  # argsort twice gives ranks: .7 .1 .4 -> 2 0 1
    return (rank < m).flatten(-2)  # (N, K, L)

def coupled_masks(num_seqs, copies, completion_len, block_size, generator):
    """(N,K,L) bool in pairs (ESPO, arXiv 2512.03759): in each block, copy K/2 + k hides just the
    tokens that copy k shows, so each token is hidden at least once. Where copy k hides all, its
    partner hides all as well. For B = 2 the pairs are (first, second), (second, first) and (both,
    both). Each copy alone is distributed as in `sample_masks`. AssertionError if K is odd."""
    assert copies % 2 == 0, f"coupled masks come in pairs: copies must be even, not {copies}"
    first = sample_masks(num_seqs, copies // 2, completion_len, block_size, generator)
    blocks = first.unflatten(-1, (-1, block_size))  # (N, K/2, L/B, B)
    second = ~blocks | blocks.all(-1, keepdim=True)
    return torch.cat((first, second.flatten(-2)), dim=1)

# What --masks means: name -> function(num_seqs, copies, completion_len, block_size, generator).
MASKS = {"independent": sample_masks, "coupled": coupled_masks}

def token_log_probs(model, prompts, completions, masks, block_size):
    """log p(y_i | its noisy block, the clean text before it) at every place i of every copy:
    prompts (M,P), completions (N,L), masks (N,K,L) bool -> (N,K,L). Where y_i is visible the value
    means nothing: callers must leave it out. Each prompt has N/M consecutive completions. It is
    read once, under the first P rows of `staircase_mask`, into a cache. Then one pass under the
    other rows reads [completion | K noisy copies], (K+1)·L tokens."""
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

def elbo(model, prompts, completions, masks, block_size, steps=None):
    """L̂ in nats (N,): Monte-Carlo estimate, from K copies, of the ELBO of log π(completion |
    prompt). Its mean over masks is `exact_elbo` (§5). Every block of every copy must hide a token.
    """
    log_p = token_log_probs(model, prompts, completions, masks, block_size)  # (N, K, L)
    blocks = (-1, block_size)
    log_p, hidden = log_p.unflatten(-1, blocks), masks.unflatten(-1, blocks)  # (N, K, L/B, B)
    m = hidden.sum(-1, keepdim=True)  # (N, K, L/B, 1)
    per_copy = (block_size / m * hidden * log_p).sum((-2, -1))  # (N, K)
    return per_copy.mean(-1)

def mean_field(model, prompts, completions, block_size, masks=None, steps=None):
    """Another estimate, (N,): the log-probability if each block were written in one step from
    blanks, its tokens independent of each other (d1, Zhao et al., arXiv 2504.12216). It has no
    noise, but a bias."""
    everything = torch.ones_like(completions, dtype=torch.bool)[:, None]  # (N, 1, L)
    return token_log_probs(model, prompts, completions, everything, block_size).sum((-2, -1))

# ==== §4  Rollout =================================================================================
# A completion is sampled so that its probability can be computed. Each step reveals one token of
# the block, then the model reads the block again. *Where* is chosen at random (order="random").
# *What* is drawn from the model's prediction for that place. So π(completion) is a plain mean over
# orders, and §5 computes it. RL trains this policy, and `reward` in the log is its reward.
#
# In contrast, order="confidence" writes where the model is surest. Real models are sampled this
# way, since their answers are then better. It is another policy. For it a completion has only one
# order, that which the model itself would choose, so its probability is one product. But this order
# depends on θ: it has to be found step by step, and it jumps while θ moves. Neither the ELBO nor §5
# is about this policy. Here it serves for evaluation only, with the likeliest token at each place:
# this is `accuracy` in the log.
#   What is read at each step, for B = 2: right of the bar. Left of it: cached. _ is [MASK].
#     |12+34=      12+34=|__   12+34=|4_   12+34=|46      12+34=46|__   12+34=46|_.
# The first and the fourth read only fill the cache.

@torch.no_grad()
def generate(model, prompts, completion_len, block_size, temperature=1.0, order="random",
             generator=None, samples=1, return_steps=False):
    """Complete prompts (M,P), each `samples` times in a row -> (N,L) long, N = M·samples; with
    return_steps also (N,L) long, at which step of its block, 0..B−1, a place was written.
    temperature divides the logits; 0 takes the likeliest token. (The likelihoods of §5 are those of
    temperature 1.) AssertionError for a wrong order or temperature, or if B does not divide P and
    L; FloatingPointError for logits that are not finite."""
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

# ==== §5  Exact likelihoods =======================================================================
# This section answers these questions: what L̂ is an estimate *of*; where its noise comes from;
# what exp does to noise; and how a ratio can be free of it. A block can be hidden in only 2^B − 1
# ways: 3 for B = 2. With a noisy copy for each, a weighted sum of the log p is the ELBO without
# noise, and a sum over all ways to write the block is π itself.
#
# Where does noise come from? Say one of two tokens is certain and the other has p = 0.01, log p =
# −4.6, whatever is visible. With the weight B/m, L̂ of this block is
#     −4.6 if both are hidden (m = 2: one time in two),
#      0   if only the certain one is (m = 1: one time in four),
#     −9.2 if only the unlikely one is (m = 1: one time in four).
# That is right on average. But L̂_θ and L̂_old draw masks of their own, and may differ by 9.2
# though θ = θ_old: ρ̂ = e^9.2 = 10,000 where ρ = 1, if L̂_old hid the unlikely token alone, and
# L̂_θ the certain one alone. (The gradient of L̂_θ for *this* block is then nearly 0. But the
# weight counts for all blocks of the completion, and in larger blocks other tokens are hidden as
# well.) A coupled pair of §3 always gives −4.6.
#
# What does exp do to it? Let η be the noise of the difference L̂_θ − L̂_old: log ρ̂ = log ρ + η, so
# ρ̂ = ρ·e^η. If η is normal with mean 0 and standard deviation σ, then E[e^η] = e^(σ²/2): at σ = 2
# nats ratios are 7 times too large on average, and a few huge ones make that average.
#
# Real noise has a longer tail than normal noise of the same σ, because the noise differs between
# answers. For most of them it is small, and a few have most of it. On the base policies of the main
# job σ, taken over all answers, is 2.0 nats. The standard deviation of a single answer has the
# median 1.2. The noisiest 5 % of them are above 4, and carry 40 % of the variance. As a result, the
# largest of 256 ratios is typically 7,000 to 19,000, depending on the base. With normal noise of
# the same σ it would be 200 to 400. And *bad answers are the noisy ones*: σ is 2.2 nats over the
# wrong answers, and 0.9 over the right ones. A wrong answer has tokens that the model found
# improbable, and an improbable token moves the estimate most, as in the example. So the noise meets
# just the case in which GRPO has no bound.
#
# What lowers it? K independent copies lower σ as 1/√K. Coupled masks lower it more while B is
# small. σ grows with B and with the length: on base policies of four tasks, with B from 2 to 8 and
# L from 4 to 16, it is roughly 0.55·B^0.64·L^0.55 nats for K = 1. The other error of L̂, the *gap*
# log π − ELBO, hardly moves in a few updates, and so cancels in the ratio.
#
# Why not simply share the masks? If L̂_θ uses the masks of L̂_old again (--shared_masks), the two
# errors nearly cancel, and nothing in the algorithm forbids it. The paper draws anew. Sharing has a
# price: all μ updates of a batch see the same K masks, so their gradients average over fewer masks,
# and each gradient is as noisy as before. And it cannot always be done: an old likelihood that
# another program has computed, an inference engine for example, comes without its masks.
#
# Is there a ratio without noise? The sampler draws a completion y *and* the order o in which to
# write it. The probability of the pair is a product over the steps: p(token | what was visible
# then), times the probability of o, which does not depend on θ. `trajectory` computes that product
# with a noisy copy per step: B of them, not 2^B − 1. Nothing is drawn, so its ratio is exactly 1 at
# θ = θ_old. This ratio is not ρ. But it is a valid importance weight, too, since importance
# sampling works on pairs: E_old[π_θ(y,o)/π_old(y,o)·f(y,o)] = E_θ[f(y,o)]. With f = A·∇log π_θ(y,o)
# this is the gradient of the expected reward again. (The mean of this ratio over o, weighted by
# π_old(o|y), is ρ.)

MAX_EXACT_BLOCK = 6  # 2^6 − 1 = 63 copies are still affordable

def every_pattern(model, prompts, completions, block_size):
    """log p under every way to hide a part of a block: (2^B−1, B) bool patterns, (N, 2^B−1, L/B, B)
    log p. A pattern hides the same places in all blocks at once. That loses nothing: noisy blocks
    do not see each other. AssertionError if B is above MAX_EXACT_BLOCK."""
    B, L = block_size, completions.shape[1]
    assert B <= MAX_EXACT_BLOCK, (
        f"exact likelihoods need 2^B - 1 copies: block_size {B} is above {MAX_EXACT_BLOCK}")
    sets = torch.arange(1, 2**B, device=completions.device)  # place i is hidden if bit i is 1
    patterns = (sets[:, None] >> torch.arange(B, device=sets.device)) % 2 == 1  # (2^B−1, B)
    masks = patterns.repeat(1, L // B).expand(len(completions), -1, -1)  # (N, 2^B−1, L)
    log_p = token_log_probs(model, prompts, completions, masks, B)  # (N, 2^B−1, L)
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
    hidden, too: it chose i, one of |h∪i| places, and wrote y_i there. So
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

def trajectory(model, prompts, completions, steps, block_size, masks=None):
    """log p(completion | prompt, order) in nats (N,): no noise. The order is that of `steps`, which
    `generate` returned. Its own probability, 1/B! per block, is left out, as it does not depend on
    θ. B copies. Source: TraceRL (Wang et al., arXiv 2509.06949)."""
    step = torch.arange(block_size, device=steps.device)[:, None]  # (B, 1)
    hidden = steps[:, None] >= step  # (N, B, L): copy k is the completion as it was before step k
    log_p = token_log_probs(model, prompts, completions, hidden, block_size)  # (N, B, L)
    return log_p.take_along_dim(steps[:, None], dim=1).sum((-2, -1))  # a place at its own step

# What --estimator means: name -> function(model, prompts, completions, block_size, masks, steps) ->
# (N,). The last five are passed by name; an estimator uses what it needs.
ESTIMATORS = {
    "elbo": elbo,
    "trajectory": trajectory,
    "mean_field": mean_field,
    "exact_elbo": exact_elbo,
    "exact": exact_log_likelihood,
}

# ==== §6  The losses ==============================================================================
# GRPO leaves one case without a bound, and StableDRL bounds it with two lines. A GPT has a ratio
# per token. Here there is one per completion, with the noise of all its tokens. Why not one per
# token? Each term of L̂ is a log p times B/m. The p is a probability, that of the token given the
# visible ones. But the terms of L̂_θ and L̂_old have masks of their own. They differ in what is
# visible and in m, so the exp of their difference is not the ratio of two probabilities of one
# event. (The terms of `trajectory`, §5, do belong together, and add up to the log-probability of
# completion and order. There one ratio per token would be possible, as in a GPT. With shared masks
# the factor B/m remains, and tokens that are not hidden have no ratio.)
#
# GRPO minimises −mean min(ρ̂·A, clip(ρ̂)·A). Let g be the gradient of L̂_θ(y) with respect to θ. As
# L̂_old is constant, ρ̂ = exp(L̂_θ − L̂_old) has the gradient ρ̂·g. Where the min is its first
# term, the gradient of the min is ρ̂·A·g. Where it is the second and the clip binds, the min is
# constant: gradient 0. Say ε = 0.2 and ρ̂ = 1,000. For A = 1 it is min(1000, 1.2), with gradient 0.
# For A = −1 it is min(−1000, −1.2), with gradient −1000·g. All losses here have the gradient −Σ
# weight·A·g / divisor:
#     weight        GRPO, A > 0    GRPO, A < 0           StableDRL, any A
#     ρ̂ < 1−ε       ρ̂              0                     1−ε (cannot happen if ε ≥ 1)
#     in between    ρ̂              ρ̂                     ρ̂
#     ρ̂ > 1+ε       0              ρ̂, HOWEVER LARGE      1+ε
#     divisor       N              N                     Σ of the group's weights · number of groups
# The case HOWEVER LARGE, the *open case*, has a reason: a bad completion that has become likelier
# must be pulled back hard. With an exact ratio, which stays near 1, that is right. With an
# estimate, ρ̂ = 1,000 mostly says that the noise was 6.9 nats; and the noisy answers are the bad
# ones (§5).
#
# For StableDRL, the negative gradient of a group is
#     Σ_j w_j A_j g_j / Σ_j w_j,     w_j = clip(ρ̂_j, 1−ε, 1+ε)
# Line 1 clips whatever the sign of A. Line 2 divides by the group's sum, so the weights add up to
# 1. The w_j are constants to autograd: they say how much a completion counts, and are not to be
# optimised.
#     line 1 alone (clip_only)   groups with large ratios outweigh the others
#     line 2 alone (norm_only)   one outlier takes all the weight of its group
#     no ratio (no_ratio)        all weigh 1/G, as if the policy were still the one that sampled
# What do bounded weights do? Thanks to line 2 the negative gradient of a group is a weighted mean
# of its A_j·g_j, so its norm is at most max_j |A_j|·‖g_j‖, whatever the ratios are. This bound
# protects whoever does not clip the norm of the gradient. `train` does clip that norm, to 1 and
# with any loss; it is larger than 1 nearly always. Adam, too, rescales every parameter's gradient
# by its usual size. So here bounded weights matter for the *direction*, that is, for which answers
# dominate the mean. Beside seven completions of ratio 1, a noisy one has at most (1+ε)/(1+ε+7) =
# 6/13 of its group's weight, and without line 1 it may have all. Line 2 keeps it out of the other
# groups. (Two limits. The share that the noisy one has of Σ w·|A| may be larger, as |A| differs: up
# to 86 % here, if it is the only bad one of the group. And line 1 has no lower bound if ε ≥ 1:
# beside seven of very small ratios, one may still have most of the weight.)
#
# What does StableDRL give up? It has no 0 in its column. In GRPO, once the updates of a batch have
# moved a completion by more than ε in the intended direction (a good one up, a bad one down), its
# weight becomes 0, and it is left alone. StableDRL goes on moving it. So ε means two things. GRPO's
# ε (0.2) takes away the reason to move further: a *trust region*. StableDRL's ε (5 in the paper)
# cuts a long tail. And the advantages of a group sum to 0, but Σ w·A does not. Where large weights
# fall on bad answers, the group as a whole is pushed down a little; where they fall on good ones,
# up.
#
# Where every ρ̂ is 1, all losses agree: their gradient is −mean A·g. So a descent step on the loss
# is an ascent step on the docstring's Σ A·log π, with L̂ for log π. Their *value* is 0 there: for
# GRPO since Σ A = 0, for StableDRL since log ρ̂ = 0. That is not a bug. The value of these losses
# means nothing, and only their gradient is used.
#
# Is mean A·g then the gradient of the expected reward? For that g must be the gradient of log π,
# and with --estimator exact or trajectory it is. (Two habits of GRPO remain. The mean of the group
# contains the reward of the answer itself, which costs a factor 1 − 1/G. And the division by the
# deviation gives more weight to prompts that are nearly always or nearly never solved.) The mean of
# ∇L̂ over masks is the gradient of the ELBO, a lower bound, so with it each update is a little off,
# even if the ratio is perfect. On addition that costs nothing that we could measure: GRPO ends at
# 2.20 times its base with exact_elbo, and at 2.19 with exact (600 updates, three seeds).

def group_advantages(rewards, group_size):
    """Rewards (N,) -> (N,): (reward − mean of its group) / (standard deviation of its group). Equal
    rewards give exactly 0: such a group teaches nothing. With G = 8, and each answer right with
    probability p, the share of such groups is p^G + (1−p)^G: 17 % at p = 0.2, 66 % at p = 0.05. (It
    is larger if p differs between prompts.)"""
    check_batch(group_size, rewards)
    groups = rewards.view(-1, group_size)  # (M, G)
    groups = groups - groups[:, :1]  # so that equal rewards give 0, not a rounding error
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = groups.std(-1, correction=0, keepdim=True)
    return (centred / (deviation + 1e-6)).flatten()  # `centred.flatten()` leaves the division out

def check_batch(group_size, *tensors):
    """AssertionError unless all tensors are (N,), with the same N, a multiple of group_size."""
    N = tensors[0].numel()
    for tensor in tensors:
        assert tensor.shape == (N,), f"shape must be (N,) = ({N},), not {list(tensor.shape)}"
    assert N % group_size == 0, f"{N} completions are not a multiple of group_size {group_size}"

def safe_exp(log_ratio):
    """exp of log_ratio (N,), as float32 ends at e^88. Above 80, value and gradient are those at 80;
    a clamp would make the gradient 0. (The norm of the gradient may still be infinite:
    `check_finite` then stops the run.)"""
    overflow = (log_ratio - 80).clamp(min=0).detach()
    return (log_ratio - overflow).exp()

def grpo_loss(log_ratio, advantages, clip_eps, group_size=1):
    """GRPO without KL term: log_ratio (N,), advantages (N,) -> scalar. group_size is not used."""
    check_batch(group_size, log_ratio, advantages)
    ratio = safe_exp(log_ratio)  # (N,)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # counts only where it lowers the objective
    per_sequence = torch.minimum(ratio * advantages, clipped * advantages)
    return -per_sequence.mean()

def stabledrl_loss(log_ratio, advantages, clip_eps, group_size, normalise=True):
    """StableDRL: log_ratio (N,), advantages (N,) -> scalar, the mean over groups. It works with
    logarithms, so nothing overflows: softmax(log w) = w/Σw. With normalise=False, line 2 divides by
    group_size instead of Σ."""
    check_batch(group_size, log_ratio, advantages)
    log_lower = math.log(1 - clip_eps) if clip_eps < 1 else -math.inf
    clipped = log_ratio.detach().clamp(log_lower, math.log(1 + clip_eps))  # line 1: always clip
    clipped = clipped.view(-1, group_size)  # (M, G)
    weights = clipped.softmax(-1) if normalise else clipped.exp() / group_size  # line 2: shares
    per_sequence = weights.flatten() * advantages * log_ratio  # its gradient is weight·A·g
    return -per_sequence.view(-1, group_size).sum(-1).mean()

# What --loss means: name -> (function(log_ratio, advantages, clip_eps, group_size), its default ε).
LOSSES = {
    "grpo": (grpo_loss, 0.2),
    "stabledrl": (stabledrl_loss, 5.0),
    "clip_only": (functools.partial(stabledrl_loss, normalise=False), 5.0),  # without line 2
    "norm_only": (stabledrl_loss, 1e30),  # without line 1: hardly any ρ̂ reaches this ε
    "no_ratio": (stabledrl_loss, 0.0),  # every ratio is clipped to 1
}

# ==== §7  Diagnostics =============================================================================
# What should one watch before the reward falls? The best sign is `spread`, the standard deviation
# of log ρ̂ at the first update of a batch. Every true ratio is 1 at that point, so whatever it
# shows is noise. A model of any size can log it. (With shared masks, or with an estimator that
# draws nothing, it is 0, and says nothing.) In our runs it told *whether* GRPO would fall behind
# what it reaches with an exact ratio, not when, nor by how much: at 2 nats it collapsed on addition
# with the default settings (it ended below half of its base's reward), and at 3.7 nats on sudoku
# with B = 2 and a smaller learning rate, it ended a fifth below its base. The second sign is the
# norm of the gradient before it is clipped. Two more numbers, `noise_std` and `drift`, need exact
# likelihoods. So they are measured only for blocks of at most MAX_EXACT_BLOCK.

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

def noise_diagnostics(log_ratio, truth, old_truth, base_truth):
    """At the last update of a batch, all (N,): log ρ̂, and log π of the policy, of the old policy
    and of the base -> dict of floats. noise_std: standard deviation of log ρ̂ − log ρ. drift: mean
    of log π_old − log π_base over answers of the old policy, an estimate of their KL divergence."""
    noise = log_ratio - (truth - old_truth)
    return {
        "noise_std": noise.std(correction=0).item(),
        "drift": (old_truth - base_truth).mean().item(),
    }

# The truth for the log. Without gradients: otherwise torch would keep all 2^B − 1 copies in memory.
true_log_prob = torch.no_grad()(exact_log_likelihood)

def note(recent, rewards, log_ratios, clip_eps, group_size):
    """Append what a batch shows to `recent`, a dict: column of the log -> list of numbers."""
    recent["reward"].append(rewards.mean().item())
    recent["spread"].append(log_ratios[0].std(correction=0).item())
    for log_ratio in log_ratios:
        for name, number in ratio_diagnostics(log_ratio, clip_eps, group_size).items():
            recent[name].append(number)

def summary(recent):
    """column -> list of numbers, into column -> mean; the maximum if its name ends in _max."""
    row = {}
    for name, numbers in recent.items():
        row[name] = max(numbers) if name.endswith("_max") else sum(numbers) / len(numbers)
    return row

def check_finite(update, loss, grad_norm, log_ratio):
    """FloatingPointError if any of these numbers is infinite or NaN."""
    if not (loss + grad_norm + log_ratio.sum()).isfinite():
        raise FloatingPointError(
            f"update {update} was not made: loss {loss:.3g}, gradient norm {grad_norm:.3g}")


# ==== §8  Training ================================================================================
# One loop, `train`, does all of RL. A batch of completions is sampled, scored by the policy as it
# is ("old"), and used for μ updates. At the first update θ is θ_old, and every ρ is 1. Later it is
# not. With μ = 1 every ρ is 1 always: the *estimate* ρ̂ is then nothing but noise, and the right
# thing is to leave it out (no_ratio). Of the helpers of `train`, `answer` samples completions and
# has them judged, `restore` and `write_row` read and write files (§9), and `note` and `summary`
# keep the log (§7). Of `truths`, which need exact likelihoods, the first and the last are used.
#
# Prompts, samples and masks each have a random stream of their own, made from the seed and the
# number of updates done. So with one seed all losses start from the same base and see the same
# prompts, whatever else they draw; and a run that is resumed draws what it would have drawn.

@dataclasses.dataclass
class Config:
    """The settings of one run. They are the flags of the command line:

    task           what to learn
    seed           every seed has a base policy of its own, and its own random numbers
    block_size     B, tokens per block (default: the task's own)
    d_model        width of the transformer
    n_layer        layers of the transformer
    n_head         attention heads per layer
    base_accuracy  pretraining stops at this accuracy
    base_lr        learning rate of pretraining; larger models need a smaller one
    loss           see section 6
    estimator      how log pi is estimated, see sections 3 and 5
    masks          how masks are drawn, see section 3
    shared_masks   both estimates of a ratio use the same masks, see section 5
    copies         K, noisy copies behind one estimate
    clip_eps       epsilon of the clip (default: the loss's own, see section 6)
    lr             learning rate of RL
    prompts        prompts per batch of completions
    group_size     G, completions per prompt
    mu             updates per batch of completions
    max_grad_norm  the norm of the gradient is clipped to this; 1e9 means never
    log_every      updates per line of the log
    updates        number of updates of a run, in all
    device         cpu, cuda or mps

    Several values of a flag mean a run for each of their combinations. Without --loss and
    --estimator, the three policies of the main job are run.
    """
    task: str = "addition"
    seed: int = 0
    block_size: int = None
    d_model: int = 64
    n_layer: int = 2
    n_head: int = 4
    base_accuracy: float = 0.4
    base_lr: float = 1e-3
    loss: str = "stabledrl"
    estimator: str = "elbo"
    masks: str = "independent"
    shared_masks: bool = False
    copies: int = 1
    clip_eps: float = None
    lr: float = 1e-4
    prompts: int = 32
    group_size: int = 8
    mu: int = 2
    max_grad_norm: float = 1.0
    log_every: int = 40
    updates: int = 1200
    device: str = "cpu"

    def __post_init__(self):
        """KeyError for a task or loss that does not exist, AssertionError for invalid numbers."""
        if self.block_size is None:
            self.block_size = TASKS[self.task].block_size
        if self.clip_eps is None:
            self.clip_eps = LOSSES[self.loss][1]
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            if kind in (int, float):
                least = LEAST.get(name, 1 if kind is int else 0)
                assert least <= value < math.inf, f"--{name} must be finite, and at least {least}"
            setattr(self, name, kind(value))  # so that 1, 1.0 and True make one run
        assert self.base_accuracy <= 1, "--base_accuracy must be at most 1"
        assert self.log_every % self.mu == 0, "--log_every must be a multiple of --mu"
        assert self.updates % self.log_every == 0, "--updates must be a multiple of --log_every"

LEAST = {"seed": 0, "group_size": 2}  # 2: a completion is compared with others of its group

def seed_for(config, purpose):
    """A seed of 63 bits, from the run's seed and a string that names the purpose."""
    return random.Random(f"{config.seed} {purpose}").getrandbits(63)

def stream(config, purpose):
    """A random generator for one purpose: nothing else draws from it."""
    return torch.Generator(config.device).manual_seed(seed_for(config, purpose))

def new_model(config):
    """An untrained model on config.device, by config.seed."""
    torch.manual_seed(config.seed)
    vocab_size = len(TASKS[config.task].vocab) + 1
    model = BlockDiffusionTransformer(vocab_size, config.d_model, config.n_layer, config.n_head)
    return model.to(config.device)

def answer(model, task, texts, block_size, **options):
    """The model answers M prompts (strings), options as in `generate`, and the task judges ->
    (batch, rewards (N,)). batch has all that an estimate needs beside model and masks: prompts
    (M,P), completions (N,L), their steps (N,L) and block_size."""
    device = model.embed.weight.device
    prompts = torch.as_tensor(encode(task, texts), device=device)
    completions, steps = generate(
        model, prompts, task.completion_len, block_size, return_steps=True, **options)
    samples = len(completions) // len(texts)
    answers = decode(task, completions)
    rewards = [float(task.reward(texts[i // samples], text)) for i, text in enumerate(answers)]
    batch = dict(prompts=prompts, completions=completions, steps=steps, block_size=block_size)
    return batch, torch.tensor(rewards, device=device)

def accuracy(model, task, block_size):
    """Share of 500 held-out prompts, always the same, solved by greedy decoding, surest first."""
    texts, _ = task.sample(np.random.default_rng(0), 500, "test")
    _, rewards = answer(model, task, texts, block_size, temperature=0, order="confidence")
    return (rewards == 1).sum().item() / 500  # some tasks give less than 1 for less than right

def pretrain(config):
    """A policy for RL to start from: maximise the ELBO of right answers until `accuracy` reaches
    base_accuracy, so that something is left to learn. TimeoutError after 2,000 updates."""
    task, B = TASKS[config.task], config.block_size
    model = new_model(config)
    optimizer = torch.optim.Adam(model.parameters(), config.base_lr)
    rng = np.random.default_rng([config.seed, 0])  # 0: not the prompts of RL
    masking = stream(config, "pretrain")
    for update in tqdm(range(2000), disable=None):
        if update % 10 == 0 and accuracy(model, task, B) >= config.base_accuracy:
            return model
        texts, solutions = task.sample(rng, 256, "train")
        prompts = torch.as_tensor(encode(task, texts), device=config.device)
        completions = torch.as_tensor(encode(task, solutions), device=config.device)
        masks = sample_masks(256, 1, task.completion_len, B, masking)
        loss = -elbo(model, prompts, completions, masks, B).mean() / task.completion_len
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise TimeoutError(f"--base_accuracy {config.base_accuracy} is not reached in 2,000 updates")

def train(config, base_model, folder):
    """RL from the base policy -> (trained model, rows of the log). Each row goes to the folder with
    a checkpoint, where the next call goes on. Errors: see `check_finite`, `generate`."""
    task, B, G = TASKS[config.task], config.block_size, config.group_size
    estimate, draw_masks = ESTIMATORS[config.estimator], MASKS[config.masks]
    loss_function, _ = LOSSES[config.loss]
    mask_shape = (config.prompts * G, config.copies, task.completion_len)  # (N, K, L)
    model = copy.deepcopy(base_model)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas=(0.9, 0.99))  # the authors'
    rows = restore(config, folder, model, optimizer)
    began, recent = time.perf_counter(), collections.defaultdict(list)
    # done: the updates made so far; more than 0 at the beginning if the run is resumed
    for done in range(len(rows) * config.log_every, config.updates, config.mu):
        log_is_due = (done + config.mu) % config.log_every == 0
        measure_noise = log_is_due and B <= MAX_EXACT_BLOCK

        # (1) The old policy answers each prompt G times, and the answers are judged.
        torch.manual_seed(seed_for(config, f"yours {done}"))  # in case your own loss draws
        rng = np.random.default_rng([config.seed, 1, done])
        texts, _ = task.sample(rng, config.prompts, "train")
        sampling = stream(config, f"samples {done}")
        batch, rewards = answer(model, task, texts, B, samples=G, generator=sampling)
        advantages = group_advantages(rewards, G)

        # (2) L̂_old: estimates of log π_old for its own answers.
        masking = stream(config, f"masks {done}")
        masks = draw_masks(*mask_shape, B, masking)
        with torch.no_grad():
            old_log_prob = estimate(model, masks=masks, **batch)  # (N,)

        # (3) μ updates learn from them: L̂_θ, the ratio, the loss, an optimiser step.
        log_ratios, truths = [], []
        for update in range(done + 1, done + config.mu + 1):
            if not config.shared_masks:
                masks = draw_masks(*mask_shape, B, masking)
            log_prob = estimate(model, masks=masks, **batch)  # (N,)
            log_ratio = log_prob - old_log_prob
            loss = loss_function(log_ratio, advantages, config.clip_eps, G)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            check_finite(update, loss, grad_norm, log_ratio)
            if measure_noise:
                truths.append(true_log_prob(model, **batch))
            optimizer.step()
            log_ratios.append(log_ratio.detach())
            recent["grad_norm"].append(grad_norm.item())

        # (4) Measure. Where a line of the log is due, write it, and a checkpoint.
        note(recent, rewards, log_ratios, config.clip_eps, G)
        if log_is_due:
            row = {"update": done + config.mu, "accuracy": accuracy(model, task, B)}
            row |= summary(recent)
            if measure_noise:
                base_truth = true_log_prob(base_model, **batch)
                row |= noise_diagnostics(log_ratios[-1], truths[-1], truths[0], base_truth)
            row["seconds"] = time.perf_counter() - began
            write_row(config, folder, rows, row, model, optimizer)
            recent.clear()
    return model, rows

# ==== §9  Command line ============================================================================
# This section adds nothing to the method: it handles files, flags, processes and a figure. A flag
# with several values means a run for each combination of values, side by side on a CPU under Linux.

MAIN_JOB = [{"loss": "grpo"}, {"loss": "grpo", "estimator": "exact"}, {"loss": "stabledrl"}]
BASE = ("task", "seed", "block_size", "d_model", "n_layer", "n_head", "base_accuracy", "base_lr")
UNNAMED = ("estimator", "seed", "updates", "device")  # named elsewhere, or not part of a name
CHOICES = {"task": TASKS, "loss": LOSSES, "estimator": ESTIMATORS, "masks": MASKS}
PANELS = ("reward", "ratio_max", "grad_norm")  # columns of the log to draw

def run_name(config):
    """The name of a run and of its folder: task, loss, estimator, all settings but UNNAMED that
    differ from the defaults, and the seed. For example addition-grpo-elbo-lr=0.0002-seed=0."""
    usual = vars(Config(task=config.task, loss=config.loss))
    words = [config.task, config.loss, config.estimator]
    for name, value in vars(config).items():
        if value != usual[name] and name not in UNNAMED:
            words.append(f"{name}={value}")
    return "-".join([*words, f"seed={config.seed}"])

def base_path(config, out):
    """The file of the base policy: one for all runs in the folder `out` that agree in BASE."""
    values = [str(getattr(config, name)) for name in BASE]
    return Path(out, f"base-{'-'.join(values)}.pt")

def save(path, rows=None, **parts):
    """Write rows and parts (models or optimizers, by name). The file gets its name when it is
    whole: a kill meanwhile leaves the old one, and two programs do not interfere."""
    state = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state | {"rows": rows}, file)
    os.replace(temporary, path)

DAMAGE = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
          EOFError, pickle.UnpicklingError)  # what torch raises when it cannot read a file

def load(path, **parts):
    """Fill parts with what `save` wrote, on any device -> rows. ValueError if the file is damaged,
    or was written for other parts."""
    try:
        file = io.BytesIO(path.read_bytes())
        state = torch.load(file, map_location="cpu")  # weights only: a hostile file runs no code
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["rows"]
    except DAMAGE:
        raise ValueError(f"{path} is damaged, or of another task or model: delete it, and it is "
                         f"made anew") from None

def write_log(config, folder, rows):
    """log.jsonl: the settings, then the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) + "\n" for line in [vars(config), *rows]]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")

def write_row(config, folder, rows, row, model, optimizer):
    """Append the row to rows; write the log, then a checkpoint. If a run is killed between the two,
    the resumed run makes the last row again."""
    rows.append(row)
    write_log(config, folder, rows)
    save(folder / "checkpoint.pt", rows=rows, model=model, optimizer=optimizer)
    report(f"{run_name(config)}  update {row['update']}  reward {row['reward']:.3f}")

def restore(config, folder, model, optimizer):
    """Set both to the run's checkpoint, if there is one -> the rows of its log so far."""
    path = folder / "checkpoint.pt"
    rows = load(path, model=model, optimizer=optimizer) if path.exists() else []
    made = len(rows) * config.log_every
    assert made <= config.updates, f"--updates {config.updates}: {folder} has {made} already"
    write_log(config, folder, rows)
    return rows

def check(config, out, resume):
    """Try with one prompt what the run needs, and read its files, before any work is done. One-line
    errors (AssertionError, ValueError, OSError) for what cannot work or cannot be read."""
    task, B, G = TASKS[config.task], config.block_size, config.group_size
    model = new_model(config)
    generator = stream(config, "check")
    texts, _ = task.sample(np.random.default_rng(0), 1, "train")
    batch, rewards = answer(model, task, texts, B, samples=G, generator=generator)
    masks = MASKS[config.masks](G, config.copies, task.completion_len, B, generator)
    log_prob = ESTIMATORS[config.estimator](model, masks=masks, **batch)
    advantages = rewards  # any numbers will do
    loss = LOSSES[config.loss][0](log_prob - log_prob.detach(), advantages, config.clip_eps, G)
    assert loss.shape == () and loss.isfinite() and loss.requires_grad, (
        f"loss {loss.tolist()} is not a finite number with a gradient, from {log_prob.tolist()}")

    folder = Path(out, run_name(config))
    assert resume or not folder.exists(), f"{folder} exists: --resume it, or choose another --out"
    Path(out).mkdir(parents=True, exist_ok=True)
    assert os.access(out, os.W_OK), f"--out {out} cannot be written"
    if base_path(config, out).exists():
        load(base_path(config, out), model=model)
    if folder.exists():
        restore(config, folder, model, torch.optim.Adam(model.parameters()))

def refuse(message):
    """End with one line and status 2: bad input, and no work was done."""
    sys.stderr.write(f"stabledrl.py: error: {' '.join(str(message).split())}\n")
    sys.exit(2)

def parse(argv):
    """Command line -> (configs, --out, --resume). A flag with several values means a run for each
    combination; runs with the same name are made once."""
    parser = argparse.ArgumentParser(
        description=Config.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    parser.error = refuse
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type, nargs="+", choices=CHOICES.get(field.name))
        if field.type is bool:
            kind = dict(action="append_const", const=True)  # the flag alone means yes
        parser.add_argument(f"--{field.name}", help=f"default: {field.default}", **kind)
    parser.add_argument("--out", default="runs", help="folder for all files; default: runs")
    parser.add_argument("--resume", action="store_true", default=False,
                        help="go on with the runs whose folders exist")
    given = vars(parser.parse_args(argv))
    out, resume = given.pop("out"), given.pop("resume")
    points = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    if not given.keys() & {"loss", "estimator"}:
        points = [point | policy for point in points for policy in MAIN_JOB]
    configs = [Config(**point) for point in points]
    return list({run_name(config): config for config in configs}.values()), out, resume

def report(line):
    """Print. A closed pipe or a full disk behind stdout costs the line, not the run. A console that
    lacks a letter gets an escape code."""
    try:
        print(f"{line}\n", end="", flush=True)
    except UnicodeError:
        print(ascii(line))
    except OSError:
        sys.stdout = open(os.devnull, "w")

def make_base(out, config):
    """Pretrain the base policy, if its file does not exist."""
    path = base_path(config, out)
    if not path.exists():
        save(path, model=pretrain(config))

def make_run(out, config):
    """Train one run from its base policy -> the rows of its log; None if there is no base policy
    (`make_base` has then reported why)."""
    path, base_model = base_path(config, out), new_model(config)
    if path.exists():
        load(path, model=base_model)
        _, rows = train(config, base_model, Path(out, run_name(config)))
        return rows

def attempt(work, out, config):
    """What work(out, config) returns; None if an error ends it. The error is reported, and the
    other runs go on."""
    try:
        return work(out, config)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        report(f"{run_name(config)} FAILED: {error}")
    except Exception:  # of any kind, in a loss or a task of your own: so with its place
        report(f"{run_name(config)} FAILED: {traceback.format_exc()}")

def start_worker():
    """What a process does first: take one thread, die quietly on Ctrl-C, and be killed with the
    program, even by kill -9."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the signal if the parent dies
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def launch(work, configs, out, jobs):
    """What `attempt` returns for each. With one job, all is done here, one after the other.
    Otherwise in processes that are forked. The process that forks must never have run a backward
    pass: where torch sees a GPU, autograd does not survive it."""
    attempt_one = functools.partial(attempt, work, out)
    if jobs == 1:
        return [attempt_one(config) for config in configs]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), start_worker) as pool:
        try:
            return list(pool.map(attempt_one, configs))
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise

def plot(logs, out):
    """Draw logs (name -> rows) into plot.svg: a panel per column, a line per run."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(9, 3), layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], PANELS):
        for name, rows in logs.items():
            label = name.replace("-", ", ").replace("=", " ")
            updates, numbers = zip(*[(row["update"], row.get(column)) for row in rows])
            axis.plot(updates, numbers, label=label)
        axis.set(title=column, xlabel="update", yscale="symlog")  # linear below 2: 0 is drawn
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center")
    figure.savefig(Path(out, "plot.svg"))

def main(argv=None):
    """Run what the command line asks for. Status 2 for bad input, 1 if a run failed."""
    try:
        configs, out, resume = parse(argv)
        for config in configs:
            check(config, out, resume)
    except (AssertionError, ValueError, OSError, RuntimeError, FloatingPointError) as error:
        refuse(error)
    report(f"base policies: {out}/base-*.pt; delete them after a change of task or model")
    one_for_each_base = {base_path(config, out): config for config in configs}.values()
    forkable = sys.platform == "linux" and configs[0].device == "cpu"
    jobs = min(len(configs), torch.get_num_threads()) if forkable else 1
    launch(make_base, one_for_each_base, out, jobs)
    results = zip(configs, launch(make_run, configs, out, jobs))
    logs = {run_name(config): rows for config, rows in results if rows}
    try:
        plot(logs, out)
    except ImportError:
        report("no figure: pip install matplotlib, and repeat the command with --resume")
    except OSError as error:
        report(f"no figure: {error}")
    if len(logs) < len(configs):
        sys.exit(1)

if __name__ == "__main__":
    try:
        main()
    except BrokenExecutor as error:  # somebody, or the system out of memory, has killed a worker
        sys.exit(f"stabledrl.py: {error} The same command with --resume goes on.")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on from the last lines")
