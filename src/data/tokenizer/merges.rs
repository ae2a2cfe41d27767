//! The merges of a byte-pair model: where they can be told to stop, and long words merged in little memory.
//!
//! The library merges a word in lists of some hundred bytes for each of its characters. That is nothing for a word, and
//! too much for a word of a million letters. Here such a word takes about five bytes per character.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::OnceLock;

use foldhash::fast::RandomState;
use serde_json::Value;

/// What a space becomes in tokenizers after SentencePiece.
pub(super) const SPACE: char = '▁';

/// A place whose token was merged into an earlier one.
const GONE: u32 = u32::MAX;

/// Pairs that may wait to be merged at once, as a share of a word's tokens; the others are looked for again later.
const WAITING_SHARE: usize = 8;
const WAITING_LEAST: usize = 1024;

/// A byte-pair model's merges, for models that do nothing but merge.
#[derive(Debug)]
pub(super) struct Merges {
    /// Left and right token and what they become, best first.
    list: Vec<[u32; 3]>,
    /// The merges by left and right token, made when a long word comes.
    table: OnceLock<HashMap<u64, (u32, u32), RandomState>>,
    /// Last characters of the tokens that are merged with a token beginning with [`SPACE`].
    before_space: HashSet<char>,
    has_space: bool,
    /// Bytes of the longest token.
    pub longest: usize,
    /// Whether words that are tokens are taken as they are, whatever the merges make of them.
    pub takes_whole_words: bool,
    /// The tokens `<0x00>` to `<0xFF>` for characters without a token of their own, if all are there.
    bytes: Option<Vec<u32>>,
}

impl Merges {
    /// The merges of the part `model` of a `tokenizer.json`. `None` for a model that does more than merge.
    pub fn read(model: &Value) -> Option<Self> {
        let is_unset = |name: &str| match model.get(name) {
            None | Some(Value::Null) => true,
            Some(value) => value == "" || value == false,
        };
        if model.get("type")? != "BPE"
            || !is_unset("continuing_subword_prefix")
            || !is_unset("end_of_word_suffix")
        {
            return None;
        }
        let mut ids: HashMap<&str, u32, RandomState> = HashMap::default();
        for (token, id) in model.get("vocab")?.as_object()? {
            ids.insert(token, u32::try_from(id.as_u64()?).ok().filter(|&id| id != GONE)?);
        }
        // Two names of one token would make it unknown which characters a token stands for.
        if ids.values().collect::<HashSet<_, RandomState>>().len() != ids.len() {
            return None;
        }
        let mut list = Vec::new();
        let mut before_space = HashSet::new();
        let mut whole = String::new();
        for merge in model.get("merges")?.as_array()? {
            let (left, right) = match merge {
                Value::String(both) => both.split_once(' ').filter(|(_, right)| !right.contains(' '))?,
                Value::Array(both) => match both.as_slice() {
                    [Value::String(left), Value::String(right)] => (left.as_str(), right.as_str()),
                    _ => return None,
                },
                _ => return None,
            };
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            list.push([*ids.get(left)?, *ids.get(right)?, *ids.get(whole.as_str())?]);
            if right.starts_with(SPACE) {
                before_space.extend(left.chars().next_back());
            }
        }
        let falls_back = model.get("byte_fallback") == Some(&Value::Bool(true));
        let byte = |byte: u8| ids.get(format!("<{byte:#04X}>").as_str()).copied();
        Some(Merges {
            list,
            table: OnceLock::new(),
            before_space,
            has_space: ids.contains_key("▁"),
            longest: ids.keys().map(|token| token.len()).max().unwrap_or(0),
            takes_whole_words: model.get("ignore_merges") == Some(&Value::Bool(true)),
            bytes: (0..=u8::MAX).map(byte).collect::<Option<Vec<u32>>>().filter(|_| falls_back),
        })
    }

    /// Whether no merge joins a token that ends with `character` to one that begins with [`SPACE`]. `is_token` says
    /// whether a character is a token by itself; one that is not may vanish, or be joined with its neighbours.
    ///
    /// Where that holds, the tokens of a text are those before the space and those from it on: whatever is merged
    /// there, the token at the border ends with `character`, since a token's text is that of its parts; and merges
    /// on one side change nothing on the other.
    pub fn stop_before_space(&self, character: char, is_token: impl Fn(char) -> bool) -> bool {
        self.has_space
            && !self.takes_whole_words
            && character != SPACE
            && !self.before_space.contains(&character)
            && is_token(character)
    }

    /// The tokens of a character's bytes, for models that have one for each byte.
    pub fn of_bytes(&self, character: char) -> Option<impl Iterator<Item = u32> + '_> {
        let bytes = self.bytes.as_ref()?;
        let mut buffer = [0; 4];
        let count = character.encode_utf8(&mut buffer).len();
        Some((0..count).map(move |place| bytes[usize::from(buffer[place])]))
    }

    /// Merges the tokens of a word's characters, best pair first, the leftmost of equals.
    pub fn merge(&self, word: &mut Vec<u32>) {
        let mut counts = vec![0u32; self.list.len()];
        loop {
            counts.fill(0);
            for rank in word.windows(2).filter_map(|pair| self.rank(pair[0], pair[1])) {
                counts[rank.0 as usize] += 1;
            }
            // As many of the best pairs as may wait, or else the best alone.
            let most = (word.len() / WAITING_SHARE).max(WAITING_LEAST);
            let Some(best) = counts.iter().position(|&count| count > 0) else { return };
            let mut waiting = 0;
            let end = counts[best..].iter().position(|&count| {
                waiting += count as usize;
                waiting > most
            });
            let mut merging = Merging { merges: self, word: &mut *word, waiting: BinaryHeap::new(), end: 0 };
            match end.map_or(counts.len(), |end| best + end) {
                end if end == best => merging.merge_rank(best as u32),
                end => merging.merge_below(end as u32),
            }
            word.retain(|&token| token != GONE);
        }
    }

    /// Rank and token of a pair.
    fn rank(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let table = self.table.get_or_init(|| {
            let ranked = self.list.iter().zip(0..);
            ranked.map(|([left, right, token], rank)| (key(*left, *right), (rank, *token))).collect()
        });
        table.get(&key(left, right)).copied()
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Some ranks of a word's pairs being merged.
struct Merging<'a> {
    merges: &'a Merges,
    /// Tokens, with [`GONE`] where one was merged into an earlier one.
    word: &'a mut Vec<u32>,
    /// Rank and place of pairs with a rank below `end`; some of these pairs may have been merged away since.
    waiting: BinaryHeap<Reverse<(u32, u32)>>,
    end: u32,
}

impl Merging<'_> {
    /// Merges all pairs with a rank below `end`, and those that arise from these merges.
    fn merge_below(&mut self, end: u32) {
        self.end = end;
        for place in 0..self.word.len().saturating_sub(1) {
            self.wait(place, place + 1);
        }
        self.merge_waiting();
    }

    /// Merges the pairs of one rank, which no pair undercuts, from left to right. What comes of a merge and undercuts
    /// them goes first. Nothing new has this rank, since a rank is that of one pair, and a merge's token is neither of
    /// its parts.
    fn merge_rank(&mut self, rank: u32) {
        self.end = rank;
        for place in 0..self.word.len() {
            while self.word[place] != GONE
                && let Some(next) = self.after(place)
                && let Some((found, token)) = self.merges.rank(self.word[place], self.word[next])
                && found == rank
            {
                self.join(place, next, token);
                self.merge_waiting();
            }
        }
    }

    fn merge_waiting(&mut self) {
        while let Some(Reverse((rank, place))) = self.waiting.pop() {
            let place = place as usize;
            if self.word[place] == GONE {
                continue;
            }
            let Some(next) = self.after(place) else { continue };
            match self.merges.rank(self.word[place], self.word[next]) {
                Some((found, token)) if found == rank => self.join(place, next, token),
                // One of the two is another token by now.
                _ => {}
            }
        }
    }

    fn join(&mut self, place: usize, next: usize, token: u32) {
        self.word[place] = token;
        self.word[next] = GONE;
        if let Some(before) = self.word[..place].iter().rposition(|&token| token != GONE) {
            self.wait(before, place);
        }
        if let Some(after) = self.after(place) {
            self.wait(place, after);
        }
    }

    /// Adds a pair to those that wait, if it is to be merged now.
    fn wait(&mut self, left: usize, right: usize) {
        if let Some((rank, _)) = self.merges.rank(self.word[left], self.word[right])
            && rank < self.end
        {
            self.waiting.push(Reverse((rank, left as u32)));
        }
    }

    /// The place of the next token, which is near: a token covers no more places than it has characters.
    fn after(&self, place: usize) -> Option<usize> {
        Some(place + 1 + self.word[place + 1..].iter().position(|&token| token != GONE)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::Model;
    use tokenizers::models::bpe::BPE;

    use super::*;

    /// A model with merges between the given tokens, in this order; its letters are `a` to `d` and [`SPACE`].
    fn model(merges: &[(String, String)], takes_whole_words: bool) -> Value {
        let mut tokens: Vec<String> = ["a", "b", "c", "d", "▁"].map(str::to_string).to_vec();
        for (left, right) in merges {
            let whole = format!("{left}{right}");
            if !tokens.contains(&whole) {
                tokens.push(whole);
            }
        }
        let vocab: serde_json::Map<String, Value> =
            tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
        json!({"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": takes_whole_words, "vocab": vocab, "merges": merges})
    }

    /// Merges between tokens that earlier merges made, in a random order: later merges may undercut earlier ones.
    fn merges() -> impl Strategy<Value = Vec<(String, String)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..14)
            .prop_map(|choices| {
                let mut tokens: Vec<String> = ["a", "b", "c", "▁"].map(str::to_string).to_vec();
                let mut merges = Vec::new();
                for (left, right) in choices {
                    let (left, right) = (left.get(&tokens).clone(), right.get(&tokens).clone());
                    if left.len() + right.len() < 12 && !merges.contains(&(left.clone(), right.clone())) {
                        tokens.push(format!("{left}{right}"));
                        merges.push((left, right));
                    }
                }
                merges
            })
            .prop_shuffle()
    }

    fn library(model: &Value) -> BPE {
        serde_json::from_str(&model.to_string()).unwrap()
    }

    fn ids(model: &BPE, text: &str) -> Vec<u32> {
        model.tokenize(text).unwrap().iter().map(|token| token.id).collect()
    }

    fn letters(model: &BPE, text: &str) -> Vec<u32> {
        text.chars().map(|letter| model.token_to_id(&letter.to_string()).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn long_words_have_the_librarys_tokens(merges in merges(), text in "[abc▁]{1,60}|(ab|a|aab){1,40}", times in 1usize..60) {
            let model = model(&merges, false);
            let (ours, library) = (Merges::read(&model).unwrap(), library(&model));
            let text = text.repeat(times);
            let mut word = letters(&library, &text);
            ours.merge(&mut word);
            prop_assert_eq!(word, ids(&library, &text));
        }

        #[test]
        fn a_text_is_the_tokens_before_a_space_and_from_it_on(merges in merges(), left in "[abcd▁x]{1,12}", right in "▁[abcdx▁]{0,12}") {
            let model = model(&merges, false);
            let (ours, library) = (Merges::read(&model).unwrap(), library(&model));
            let last = left.chars().next_back().unwrap();
            let is_token = |letter: char| library.token_to_id(&letter.to_string()).is_some();
            if ours.stop_before_space(last, is_token) {
                let apart = [ids(&library, &left), ids(&library, &right)].concat();
                prop_assert_eq!(ids(&library, &format!("{left}{right}")), apart);
            }
        }
    }

    #[test]
    fn a_long_run_of_one_letter_is_merged_from_the_left() {
        let doubling: Vec<(String, String)> =
            (0..6).map(|power| ("a".repeat(1 << power), "a".repeat(1 << power))).collect();
        let model = model(&doubling, false);
        let (ours, library) = (Merges::read(&model).unwrap(), library(&model));
        for length in [1, 2, 3, 20_000, 20_001, 20_063] {
            let text = "a".repeat(length);
            let mut word = letters(&library, &text);
            ours.merge(&mut word);
            assert_eq!(word, ids(&library, &text), "{length}");
        }
    }

    #[test]
    fn a_pair_that_has_become_another_waits_for_its_own_turn() {
        let pairs = [("b", "c"), ("a", "b"), ("d", "a"), ("a", "bc")];
        let merges = pairs.map(|(left, right)| (left.to_string(), right.to_string()));
        let model = model(&merges, false);
        let (ours, library) = (Merges::read(&model).unwrap(), library(&model));
        let mut word = letters(&library, "dabc");
        ours.merge(&mut word);
        assert_eq!(word, ["da", "bc"].map(|token| library.token_to_id(token).unwrap()));
        assert_eq!(word, ids(&library, "dabc"));
    }

    #[test]
    fn merges_stop_before_a_space_only_where_none_reaches_over_it() {
        let stops = |merges: &[(&str, &str)], takes_whole_words, letter| {
            let merges: Vec<(String, String)> =
                merges.iter().map(|(left, right)| (left.to_string(), right.to_string())).collect();
            let ours = Merges::read(&model(&merges, takes_whole_words)).unwrap();
            ours.stop_before_space(letter, |letter| letter != 'x')
        };
        let plain = [("▁", "a"), ("▁", "▁"), ("a", "b")];
        assert!(stops(&plain, false, 'a'));
        assert!(!stops(&plain, true, 'a'), "a part may be a token as a whole word");
        assert!(!stops(&plain, false, '▁'));
        assert!(!stops(&plain, false, 'x'), "no token of the model");
        assert!(!stops(&[("▁", "a"), ("b", "▁a")], false, 'b'));
        assert!(stops(&[("▁", "a"), ("b", "▁a")], false, 'a'));
    }

    #[test]
    fn models_that_do_more_than_merge_are_left_to_the_library() {
        let plain = model(&[("a".to_string(), "b".to_string())], false);
        for (key, value) in [
            ("type", json!("Unigram")),
            ("continuing_subword_prefix", json!("##")),
            ("end_of_word_suffix", json!("</w>")),
            ("merges", json!([["a", "nothing"]])),
            ("merges", json!(["a b c"])),
            ("vocab", json!({"a": 0, "b": 0, "ab": 1})),
        ] {
            let mut other = plain.clone();
            other[key] = value;
            assert!(Merges::read(&other).is_none(), "{key}");
        }
    }
}
