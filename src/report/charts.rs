//! The charts of one run: which metrics they show, and what a reader should know of each.

use super::chart::{Chart, Line, LineKind};
use super::history::History;

/// The charts for which a run's metrics have lines.
pub fn charts(history: &History) -> Vec<Chart> {
    let charts = [preference_charts(history), reward_charts(history), training_charts(history)];
    charts.into_iter().flatten().flatten().collect()
}

/// The line of a value that every step has; its trend is drawn.
fn line(history: &History, name: &'static str, series: &str, style: usize) -> Line {
    Line { name: name.into(), points: history.series(series), style, kind: LineKind::Noisy }
}

/// The dots of a value that every evaluation has.
fn dots(history: &History, name: &'static str, series: &str, style: usize) -> Line {
    Line { kind: LineKind::Dots, ..line(history, name, series, style) }
}

/// What training does to the preferences of the model.
fn preference_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, style| line(history, name, series, style);
    let dots = |name, series, style| dots(history, name, series, style);
    vec![
        Chart::of(
            "Loss",
            "Mean over the pairs of a step.",
            false,
            vec![line("training", "loss", 0), dots("evaluation", "eval_loss", 1)],
        ),
        Chart::of(
            "Chosen gained more",
            "Share of pairs whose chosen response gained more log-prob over the reference than the rejected one. A tie counts \
             as half, so a run begins at 50 %.",
            true,
            vec![
                line("training", "implicit/accuracies", 0),
                dots("evaluation", "eval_implicit/accuracies", 1),
            ],
        ),
        Chart::of(
            "Gain of chosen over rejected",
            "Mean of how much more the chosen response gained over the reference, in nats.",
            false,
            vec![line("training", "implicit/margins", 0), dots("evaluation", "eval_implicit/margins", 1)],
        ),
        Chart::of(
            "Chosen is likelier",
            "Share of pairs whose chosen response has the higher log-prob.",
            true,
            vec![line("training", "logps/accuracies", 0), dots("evaluation", "eval_logps/accuracies", 1)],
        ),
    ]
}

/// What the objective computes on the way: rewards, log-probs and weights.
fn reward_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, style| line(history, name, series, style);
    let dots = |name, series, style| dots(history, name, series, style);
    vec![
        Chart::of(
            "Reward accuracy",
            "Share of pairs whose chosen response has the higher reward. MMPO's rewards hold a part of the label, so theirs is \
             high before any training.",
            true,
            vec![line("training", "rewards/accuracies", 0), dots("evaluation", "eval_rewards/accuracies", 1)],
        ),
        Chart::of(
            "Rewards",
            "Mean reward of the chosen and the rejected responses.",
            false,
            vec![
                line("chosen", "rewards/chosen", 0),
                line("rejected", "rewards/rejected", 1),
                dots("chosen, evaluation", "eval_rewards/chosen", 2),
                dots("rejected, evaluation", "eval_rewards/rejected", 3),
            ],
        ),
        Chart::of(
            "Reward margin",
            "Mean of chosen minus rejected.",
            false,
            vec![line("training", "rewards/margins", 0), dots("evaluation", "eval_rewards/margins", 1)],
        ),
        Chart::of(
            "Log-probs",
            "Mean log-prob of a whole response, in nats.",
            false,
            vec![line("chosen", "logps/chosen", 0), line("rejected", "logps/rejected", 1)],
        ),
        Chart::of(
            "MMPO weights",
            "Mean softmax weight of the chosen response, and the share of pairs with a weight above 0.99, which train on \
             one response alone.",
            true,
            vec![
                line("weight of chosen", "weights/chosen", 0),
                line("saturated pairs", "weights/saturated", 1),
            ],
        ),
    ]
}

/// How the training itself goes.
fn training_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, style| line(history, name, series, style);
    let memory = Line { kind: LineKind::Exact, ..line("peak memory", "memory/peak_gib", 0) };
    let learning_rate = Line { kind: LineKind::Exact, ..line("learning rate", "learning_rate", 0) };
    vec![
        Chart::of(
            "Gradient norm",
            "Global l2 norm before clipping.",
            false,
            vec![line("gradient norm", "grad_norm", 0)],
        ),
        Chart::of("Learning rate", "After warm-up and schedule.", false, vec![learning_rate]),
        Chart::of(
            "Speed",
            "Tokens per second, prompts counted once.",
            false,
            vec![line("tokens per second", "tokens_per_second", 0)],
        ),
        Chart::of(
            "Model FLOPs used",
            "Share of the device's peak that the arithmetic of the model takes (MFU).",
            true,
            vec![line("mfu", "mfu", 0)],
        ),
        Chart::of(
            "Peak memory",
            "The most that the device's buffers held so far, in GiB.",
            false,
            vec![memory],
        ),
    ]
}
