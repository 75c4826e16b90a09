"""A few agent tokens broker between queries and keys, in linear time.

Method: headwise/attention/agent.py; trained models take it without training by headwise/models/training_free_agents.py.
"""

from typing import TYPE_CHECKING

from headwise.papers.record import Claim, Paper

if TYPE_CHECKING:
    from headwise.papers.running import Run
    from headwise.papers.verdicts import Measured

PAPER = Paper(
    slug="agent-attention",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    authors="Han, Ye, Han, Xia, Pan, Wan, Song, Huang",
    year=2024,
    venue="ECCV 2024",
    arxiv="2312.08874",
    repository="LeapLabTHU/Agent-Attention",
    area="attention",
    modules=(
        "headwise.attention.agent",
        "headwise.attention._agent_blocks",
        "headwise.models.agent_deit",
        "headwise.models.training_free_agents",
        "headwise.models.diffusion_agents",
        "headwise.ops.pooling",
        "headwise.ops.token_merging",
        "headwise.papers._agent_setup",
        "headwise.papers._agent_rows",
    ),
    claims=(
        Claim(
            id="key-component",
            kind="untestable",
            claim="The attention module is the key component in Transformers.",
            criterion="a remark about the field",
        ),
        Claim(
            id="cost",
            kind="untestable",
            claim=(
                "While the global attention mechanism offers high expressiveness, its excessive computational cost "
                "restricts its applicability in various scenarios."
            ),
            criterion=(
                "where a cost restricts use is a judgement about applications; how the cost of both grows is measured "
                "in the row efficient"
            ),
        ),
        Claim(
            id="balance",
            kind="claim",
            claim=(
                "In this paper, we propose a novel attention paradigm, Agent Attention, to strike a favorable balance "
                "between computational efficiency and representation power."
            ),
            criterion=(
                "in one small vision transformer trained on digits (16 tokens, 4 agents) the mean test accuracy with "
                "agent attention is at least that with softmax attention, and its products (49 agents, biases "
                "included) are at least 5 times as fast as fused softmax attention at 3,136 tokens"
            ),
            control="softmax attention with the same convolution, linear attention with it, agents without it",
        ),
        Claim(
            id="definition",
            kind="check",
            claim=(
                "Specifically, the Agent Attention, denoted as a quadruple (Q, A, K, V), introduces an additional set "
                "of agent tokens A into the conventional attention module. The agent tokens first act as the agent for "
                "the query tokens Q to aggregate information from K and V, and then broadcast the information back to "
                "Q."
            ),
            criterion=(
                "the plain, blocked and fused forms equal torch's softmax attention of the agents over the keys, then "
                "of the queries over the agents, to 1e-12 in float64; agents are mean queries of windows to 1e-12"
            ),
        ),
        Claim(
            id="efficient",
            kind="claim",
            claim=(
                "Given the number of agent tokens can be designed to be much smaller than the number of query tokens, "
                "the agent attention is significantly more efficient than the widely adopted Softmax attention, while "
                "preserving global context modelling capability."
            ),
            criterion=(
                "with 49 agents, at least 5 times as fast as fused softmax attention at 3,136 tokens (4 heads of 32, "
                "one thread, median ratio of rounds of one process), and 4 times the tokens take less than 6 times as "
                "long; in the trained model every output depends on every token: the smallest entry of the implied map "
                "of every head is above 0"
            ),
            control="the growth of softmax attention; how much of a row lies within the 3 x 3 tokens around its own",
        ),
        Claim(
            id="linear",
            kind="claim",
            claim=(
                "Interestingly, we show that the proposed agent attention is equivalent to a generalized form of "
                "linear attention."
            ),
            criterion=(
                "in float64, with feature maps f = softmax(Q A^T) and g = softmax(A K^T)^T, the output is f (g^T V) "
                "and (f g^T) V to 1e-12; the map f g^T has no negative entry, rows of sum 1 to 1e-12, and rank n"
            ),
            control="the rank of the softmax map of the same queries and keys",
        ),
        Claim(
            id="integrates",
            kind="claim",
            claim=(
                "Therefore, agent attention seamlessly integrates the powerful Softmax attention and the highly "
                "efficient linear attention."
            ),
            criterion=(
                "with the keys as agents and a sharp first map it is softmax attention, to 1e-9 in float64; with a "
                "fixed number of agents twice the tokens are exactly twice the operations; and the test accuracy on "
                "digits is at least that of softmax attention and at least that of linear attention (with the same "
                "convolution) less one point"
            ),
            control="operations of softmax attention at twice the tokens; softmax attention with the convolution",
        ),
        Claim(
            id="classification",
            kind="claim",
            claim=(
                "Extensive experiments demonstrate the effectiveness of agent attention with various vision "
                "Transformers and across diverse vision tasks, including image classification,"
            ),
            paper_figure=(
                "ImageNet-1K top-1: Agent-DeiT-T/S/B 74.9/80.5/82.0 (DeiT 72.2/79.8/81.8), Agent-Swin-T/S/B "
                "82.6/83.7/84.0 (81.2/83.0/83.5); official README and its plot"
            ),
            criterion=(
                "mean test accuracy on digits over starts: agent attention at least as good as softmax attention, and "
                "as linear attention with the same convolution less one point"
            ),
            control="softmax attention with the same convolution",
        ),
        Claim(
            id="beyond-convolution",
            kind="claim",
            claim="The same effectiveness, beyond what the convolution that comes with it gives to softmax attention.",
            criterion=(
                "mean test accuracy on digits over starts: agent attention at least as good as softmax attention with "
                "the same convolution"
            ),
            control="agents without the convolution, softmax attention without it",
            known=(
                "with the convolution both are alike (gains of -0.67, 0.08 and 0.42 points); most of what agent "
                "attention gains over plain softmax attention here is the convolution's"
            ),
        ),
        Claim(
            id="other-tasks",
            kind="untestable",
            claim="object detection, semantic segmentation and image generation.",
            criterion=(
                "COCO, ADE20K and ImageNet with detectors and diffusion networks of hundreds of millions of parameters "
                "are not at hand"
            ),
        ),
        Claim(
            id="high-resolution",
            kind="claim",
            claim=(
                "Notably, agent attention has shown remarkable performance in high-resolution scenarios, owning to its "
                "linear attention nature."
            ),
            paper_figure="Agent-DeiT-S at 448 x 448: 83.1 % with 17.7 G operations (official README)",
            criterion=(
                "with single pixels as tokens (64 instead of 16, still 4 agents) the test accuracy on digits is at "
                "least that of softmax attention after as many steps, and the advantage in time over softmax attention "
                "at 3,136 tokens is at least twice that at 784"
            ),
            control="softmax attention with the same convolution at 64 tokens",
            known=(
                "timed on a busy machine: the ratio at 784 tokens, calls of a few milliseconds, came out as 1.4, 3.0 "
                "and 15.7, that at 3,136 as 20.1, 17.3 and 19.0. The accuracies are those of 200 steps, after which no "
                "network has learned single pixels well (softmax attention is near chance): they compare the start of "
                "training only"
            ),
        ),
        Claim(
            id="stable-diffusion",
            kind="untestable",
            claim=(
                "For instance, when applied to Stable Diffusion, our agent attention accelerates generation and "
                "substantially enhances image generation quality without any additional training."
            ),
            paper_figure="FID 28.84 to 27.79 at 10 % merged tokens, 1.33 times as fast (official README)",
            criterion=(
                "Stable Diffusion's weights and an ImageNet to compare with are not at hand; "
                "headwise.models.agent_diffusion does it for a diffusers pipeline"
            ),
        ),
        Claim(
            id="training-free",
            kind="check",
            claim="Pooled agents replace a trained model's attention without training, with the paper's constants.",
            criterion=(
                "a vision transformer trained with softmax attention on digits keeps its test accuracy within 2 points "
                "with 4 agents for 16 tokens (second scale to the power 0.3, shortcut 0.075, no new parameter), and "
                "has at least 30 points more than with keys and values pooled to 4, which costs the same"
            ),
            control="keys and values pooled to 1, 4 and 9; agents with the plain scale and no shortcut",
        ),
        Claim(
            id="sizes",
            kind="check",
            claim="Agent-DeiT has the paper's parameters and operations.",
            paper_figure="Agent-DeiT-T 6.0 M parameters (DeiT-T 5.7 M); Agent-DeiT-S at 448 x 448 17.7 G",
            criterion="6.0 M parameters (one decimal), and within 0.1 of 17.7 G multiply-adds at 448 x 448",
            control="the same networks with softmax in every layer",
        ),
    ),
)


def reproduce(run: "Run") -> dict[str, "Measured"]:
    """Train one small vision transformer with each attention, swap agents into trained ones, time the products."""
    from headwise.papers import _agent_rows as rows
    from headwise.papers._agent_setup import Fine, Speed, Swapped, Trained

    speed = Speed.of(run)
    trained = Trained.of(run)
    swapped = Swapped.of(trained, run)
    fine = Fine.of(run)
    rows.draw(run, trained, swapped, speed)
    return {
        "balance": rows.balance(trained, speed),
        "definition": rows.definition(run),
        "efficient": rows.efficient(trained, speed, run),
        "linear": rows.linear(run),
        "integrates": rows.integrates(trained, run),
        "classification": rows.classification(trained),
        "beyond-convolution": rows.beyond_convolution(trained),
        "high-resolution": rows.high_resolution(fine, speed),
        "training-free": rows.training_free(swapped),
        "sizes": rows.sizes(),
    }
