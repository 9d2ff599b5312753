"""What the gallery shows, in order (``benchmarks/gallery.py``)."""

from __future__ import annotations

from gallery import CLAIMS, DEMO, END_TO_END, GRID, PLANES, STUDY, VALIDATED, Shown

SHOWN = [
    Shown(
        "Training, figure 5's form",
        "The loss, its two terms, the induction heads in a prompt, the punish weight A as the "
        "controller sets it, and validation accuracy.",
        VALIDATED,
        "training",
        ("training",),
    ),
    Shown(
        "Attention over the prompt, figures 8 and 16",
        "Every head's last row: the first layer reads the query, the others look at labels; ABFT "
        "moves them to the labels equal to the gold one (▼) and off the others (✕).",
        DEMO,
        "attention",
        ("attention-1",),
    ),
    Shown(
        "The same, with end-to-end fine-tuning of the same weights beside it",
        "Trained on the label's cross-entropy the same heads move the same way, and leave more "
        "attention on wrong labels of this prompt.",
        DEMO,
        "attention",
        ("attention-1",),
        END_TO_END,
    ),
    Shown(
        "Attention on labels layer by layer, figure 4",
        "All labels, and those equal to the gold one, before and after.",
        DEMO,
        "label_attention",
        ("label-attention",),
    ),
    Shown(
        "Layer × head: attention on labels",
        "Magnitude before, after, and the change.",
        DEMO,
        "magnitude",
        ("magnitude",),
    ),
    Shown(
        "Layer × head: right labels minus wrong ones",
        "Correctness: what ABFT trains.",
        DEMO,
        "correctness",
        ("correctness",),
    ),
    Shown(
        "Layer × head: above the filter",
        "The share of prompts in which a head counts as an induction head.",
        DEMO,
        "share",
        ("share",),
    ),
    Shown(
        "Layer × head: attention sink",
        "Attention on the prompt's first token: below 0.02% in every head of this model.",
        DEMO,
        "sink",
        ("sink",),
    ),
    Shown(
        "Two notions of an induction head",
        "Attention on labels against the induction score on repeated random tokens. This model's "
        "heads, which were taught to read labelled sentences, look at labels and hardly continue "
        "random repeats.",
        DEMO,
        "detectors",
        ("detectors-before",),
    ),
    Shown(
        "Parameter shift, appendix B",
        "How far W_Q and W_K moved in every layer, ABFT and end to end.",
        DEMO,
        "shift",
        ("shift",),
        END_TO_END,
    ),
    Shown(
        "Confusion",
        "Gold labels down, answers across, before and after.",
        DEMO,
        "confusion",
        ("confusion",),
    ),
    Shown(
        "Reliability",
        "Accuracy at each confidence, and how many prompts are there: less overconfident after, "
        "still overconfident.",
        DEMO,
        "reliability",
        ("reliability",),
    ),
    Shown(
        "Time to accuracy",
        "Validation accuracy over the seconds spent in updates; seconds are this machine's, and it "
        "was busy.",
        VALIDATED,
        "time_to_accuracy",
        ("time-to-accuracy",),
    ),
    Shown(
        "Methods by tasks, table 1",
        "From the study of the paper's claims, four seeds.",
        CLAIMS,
        "accuracy",
        ("accuracy-demo",),
    ),
    Shown(
        "Consistency, table 3",
        "Answers that stay the same over wordings and over sets of demonstrations.",
        CLAIMS,
        "consistency",
        ("consistency-demo",),
    ),
    Shown(
        "Unseen labels, figure 3",
        "Accuracy where no demonstration has the query's label.",
        CLAIMS,
        "unseen",
        ("unseen-demo",),
    ),
    Shown(
        "Induction heads while training",
        "With and without the controller and the filter.",
        CLAIMS,
        "head_count",
        ("head-count-demo",),
    ),
    Shown(
        "Training curves of a study",
        "Means over tasks and seeds.",
        CLAIMS,
        "training",
        ("training-demo",),
    ),
    Shown(
        "Label attention of a study",
        "As figure 4, over tasks and seeds.",
        CLAIMS,
        "label_attention",
        ("label-attention-demo",),
    ),
    Shown(
        "Both weights, figure 6",
        "Accuracy over A and B.",
        GRID,
        "grid",
        ("grid-demo-abft",),
    ),
    Shown(
        "Between two fine-tunings, figure 7",
        "Accuracy on the straight line from ABFT's weights to end-to-end's.",
        PLANES,
        "interpolation",
        ("interpolation-demo-generated-question-abft-end_to_end",),
    ),
    Shown(
        "The plane of both, figures 7 and 9",
        "Accuracy at every combination of the two changes.",
        PLANES,
        "plane",
        ("plane-demo-generated-question-abft-end_to_end",),
    ),
    Shown(
        "Data efficiency, figure 2",
        "Accuracy over the number of training examples.",
        STUDY,
        "data_efficiency",
        ("data-efficiency-demo",),
    ),
    Shown(
        "Extrapolation",
        "Accuracy over the factor of an adapter, chosen on validation rows.",
        STUDY,
        "extrapolation",
        ("extrapolation-demo",),
    ),
]
