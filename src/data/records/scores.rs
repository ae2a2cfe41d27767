//! Scores of the two responses, as published sets have them beside their pairs.

use serde_json::Value;

/// Names of the scores of the better and of the worse response: UltraFeedback-binarized as published by Hugging Face H4,
/// its mirror image, and the sets of Argilla (whose newer names have a hyphen or the words the other way round).
pub(in crate::data) const SCORE_COLUMNS: [[&str; 2]; 7] = [
    ["score_chosen", "score_rejected"],
    ["chosen_score", "rejected_score"],
    ["chosen_rating", "rejected_rating"],
    ["chosen-rating", "rejected-rating"],
    ["rating_chosen", "rating_rejected"],
    ["chosen_avg_rating", "rejected_avg_rating"],
    ["reward_chosen", "reward_rejected"],
];

/// Two ratings in a list, in the order in which the two were generated (Orca pairs as Argilla rated them).
pub(in crate::data) const RATINGS: &str = "rating";

/// The scores of one record.
#[derive(Debug, Default)]
pub(super) struct Scores {
    /// By the place of the names in [`SCORE_COLUMNS`].
    sides: [[Option<f64>; 2]; SCORE_COLUMNS.len()],
    /// How far apart two ratings in a list are.
    apart: Option<f64>,
}

impl Scores {
    /// Takes the column `name` with its JSON, if it is one of scores.
    pub fn take(&mut self, name: &str, json: &[u8]) {
        for (names, sides) in SCORE_COLUMNS.iter().zip(&mut self.sides) {
            if let Some(side) = names.iter().position(|side| *side == name) {
                sides[side] = serde_json::from_slice(json).ok().and_then(|value| number(&value));
            }
        }
        if name == RATINGS {
            let list: Option<Vec<Value>> = serde_json::from_slice(json).ok();
            self.apart = match list.as_deref() {
                Some([one, other]) => number(one).zip(number(other)).map(|(one, other)| (one - other).abs()),
                _ => None,
            };
        }
    }

    /// The better response's score less the worse one's, by the first names of which both are there.
    pub fn gap(&self) -> Option<f64> {
        let gaps = self.sides.iter().filter_map(|[chosen, rejected]| Some((*chosen)? - (*rejected)?));
        gaps.chain(self.apart).find(|gap| gap.is_finite())
    }
}

/// A number, or a text of one, as tables of text have it.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(columns: &[(&str, &str)]) -> Option<f64> {
        let mut scores = Scores::default();
        columns.iter().for_each(|(name, json)| scores.take(name, json.as_bytes()));
        scores.gap()
    }

    #[test]
    fn the_gap_is_found_under_every_published_name() {
        for [chosen, rejected] in SCORE_COLUMNS {
            assert_eq!(gap(&[(chosen, "8.5"), (rejected, "6")]), Some(2.5), "{chosen}");
            assert_eq!(gap(&[(chosen, "\"1\""), (rejected, "\" 3.5 \"")]), Some(-2.5), "{chosen}");
            assert_eq!(gap(&[(chosen, "8.5")]), None, "{chosen} alone");
            assert_eq!(gap(&[(chosen, "8.5"), (rejected, "null")]), None);
            assert_eq!(gap(&[(chosen, "NaN"), (rejected, "1")]), None);
        }
        assert_eq!(gap(&[("rating", "[7, 9.5]"), ("chosen_score", "9.5")]), Some(2.5));
        for wrong in ["[7]", "[7, 8, 9]", "null", "8", "[7, \"good\"]"] {
            assert_eq!(gap(&[("rating", wrong)]), None, "{wrong}");
        }
        assert_eq!(gap(&[("margin", "3")]), None);
    }
}
