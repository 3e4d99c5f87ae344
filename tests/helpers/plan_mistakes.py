"""Packing plans with mistakes that look right."""

import dataclasses

import torch

from trl_cpo.engine.forward.plan import CHOSEN, REJECTED, SHARED


def running_positions(plan):
    positions = torch.arange(plan.shape[1]).expand(plan.shape).clone()
    return dataclasses.replace(plan, position_ids=positions)


def positions_off_by_one(plan):
    return dataclasses.replace(plan, position_ids=plan.position_ids + (plan.branch == REJECTED))


def rejected_sees_chosen(plan):
    return dataclasses.replace(plan, branch=torch.where(plan.branch == REJECTED, CHOSEN, plan.branch))


def chosen_is_shared(plan):
    return dataclasses.replace(plan, branch=torch.where(plan.branch == CHOSEN, SHARED, plan.branch))


def pairs_see_each_other(plan):
    return dataclasses.replace(plan, pair=plan.pair.clamp(max=0))


def first_answer_token_from_the_branch(plan):
    seams = torch.tensor([p.start + p.shared - 1 for p in plan.parts])
    return dataclasses.replace(plan, scored=plan.scored + torch.isin(plan.scored, seams))
