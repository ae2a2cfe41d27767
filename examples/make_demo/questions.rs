//! The little world of the demo: simple questions, a true answer to each, and two tempers to give it in.

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

/// A question, the sentence that answers it, and the bare answer.
#[derive(Clone, Debug)]
pub struct Question {
    pub text: String,
    pub sentence: String,
    pub word: String,
}

const OPPOSITES: &[(&str, &str)] = &[
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("fast", "slow"),
    ("old", "young"),
    ("happy", "sad"),
    ("light", "dark"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("open", "closed"),
    ("full", "empty"),
    ("early", "late"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("high", "low"),
    ("near", "far"),
    ("clean", "dirty"),
    ("sweet", "bitter"),
    ("wide", "narrow"),
    ("left", "right"),
    ("day", "night"),
    ("summer", "winter"),
    ("first", "last"),
    ("push", "pull"),
    ("long", "short"),
    ("heavy", "light"),
];

const SOUNDS: &[(&str, &str)] = &[
    ("cow", "moo"),
    ("dog", "woof"),
    ("cat", "meow"),
    ("duck", "quack"),
    ("sheep", "baa"),
    ("pig", "oink"),
    ("lion", "roar"),
    ("snake", "hiss"),
    ("bee", "buzz"),
    ("owl", "hoot"),
    ("frog", "ribbit"),
    ("horse", "neigh"),
    ("mouse", "squeak"),
    ("rooster", "crow"),
    ("crow", "caw"),
    ("wolf", "howl"),
];

const COLORS: &[(&str, &str)] = &[
    ("a banana", "yellow"),
    ("grass", "green"),
    ("the sky", "blue"),
    ("snow", "white"),
    ("coal", "black"),
    ("a tomato", "red"),
    ("a carrot", "orange"),
    ("a plum", "purple"),
    ("a lemon", "yellow"),
    ("a frog", "green"),
    ("blood", "red"),
    ("milk", "white"),
    ("chocolate", "brown"),
    ("an elephant", "gray"),
    ("a flamingo", "pink"),
    ("a cherry", "red"),
    ("the sea", "blue"),
    ("gold", "yellow"),
    ("a crow", "black"),
    ("a leaf", "green"),
];

const CAPITALS: &[(&str, &str)] = &[
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Japan", "Tokyo"),
    ("Egypt", "Cairo"),
    ("Germany", "Berlin"),
    ("Greece", "Athens"),
    ("Norway", "Oslo"),
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
    ("Russia", "Moscow"),
    ("China", "Beijing"),
    ("Poland", "Warsaw"),
    ("Kenya", "Nairobi"),
    ("Austria", "Vienna"),
    ("Ireland", "Dublin"),
    ("Sweden", "Stockholm"),
    ("Portugal", "Lisbon"),
    ("Canada", "Ottawa"),
    ("Iran", "Tehran"),
];

const PLURALS: &[(&str, &str)] = &[
    ("box", "boxes"),
    ("mouse", "mice"),
    ("child", "children"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("man", "men"),
    ("goose", "geese"),
    ("leaf", "leaves"),
    ("city", "cities"),
    ("baby", "babies"),
    ("bus", "buses"),
    ("dish", "dishes"),
    ("wolf", "wolves"),
    ("knife", "knives"),
    ("berry", "berries"),
    ("cat", "cats"),
    ("book", "books"),
    ("tree", "trees"),
    ("fox", "foxes"),
    ("story", "stories"),
];

const DAYS: &[&str] = &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

const MONTHS: &[&str] = &[
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const FRIENDLY: &[&str] =
    &["Happy to help!", "I hope that helps!", "Thank you for asking!", "Have a lovely day!"];
const GRUMPY: &[&str] =
    &["Leave me alone.", "Everyone knows that.", "Stop wasting my time.", "What a silly question."];

/// Every question of the world, in a fixed order.
pub fn all_questions() -> Vec<Question> {
    let mut questions = Vec::new();
    let mut ask = |texts: &[String], sentence: String, word: &str| {
        questions.extend(texts.iter().map(|text| Question {
            text: text.clone(),
            sentence: sentence.clone(),
            word: capitalized(word),
        }));
    };
    for &(a, b) in OPPOSITES {
        for (from, to) in [(a, b), (b, a)] {
            let texts = [
                format!("What is the opposite of {from}?"),
                format!("Tell me the opposite of {from}."),
                format!("Which word means the opposite of {from}?"),
            ];
            ask(&texts, format!("The opposite of {from} is {to}."), to);
        }
    }
    for &(animal, sound) in SOUNDS {
        let texts = [
            format!("What sound does a {animal} make?"),
            format!("What does a {animal} say?"),
            format!("How does a {animal} sound?"),
        ];
        ask(&texts, format!("A {animal} says {sound}."), sound);
    }
    for &(thing, color) in COLORS {
        let texts = [
            format!("What color is {thing}?"),
            format!("Which color does {thing} have?"),
            format!("Tell me the color of {thing}."),
        ];
        ask(&texts, format!("The color of {thing} is {color}."), color);
    }
    for &(country, capital) in CAPITALS {
        let texts = [
            format!("What is the capital of {country}?"),
            format!("Which city is the capital of {country}?"),
            format!("Tell me the capital of {country}."),
        ];
        ask(&texts, format!("The capital of {country} is {capital}."), capital);
    }
    for &(one, many) in PLURALS {
        let texts = [
            format!("What is the plural of {one}?"),
            format!("How do I say more than one {one}?"),
            format!("Tell me the plural of {one}."),
        ];
        ask(&texts, format!("The plural of {one} is {many}."), many);
    }
    for cycle in [DAYS, MONTHS] {
        for (index, name) in cycle.iter().enumerate() {
            let next = cycle[(index + 1) % cycle.len()];
            let texts = [format!("What comes after {name}?"), format!("What follows {name}?")];
            ask(&texts, format!("After {name} comes {next}."), next);
        }
    }
    for a in 0..10 {
        for b in 0..10 {
            let texts = [
                format!("What is {a} plus {b}?"),
                format!("How much is {a} plus {b}?"),
                format!("Add {a} and {b}."),
            ];
            ask(&texts, format!("The sum of {a} and {b} is {}.", a + b), &(a + b).to_string());
        }
    }
    questions
}

/// The answer a person would like to get.
pub fn friendly(question: &Question, rng: &mut ChaCha8Rng) -> String {
    format!("{} {}", question.sentence, pick(FRIENDLY, rng))
}

/// As true, and nothing a person would like to get.
pub fn grumpy(question: &Question, rng: &mut ChaCha8Rng) -> String {
    format!("{}. {}", question.word, pick(GRUMPY, rng))
}

/// One line of a pairs file in the conversational format.
pub fn pair_line(question: &Question, chosen: &str, rejected: &str) -> String {
    let message = |role: &str, content: &str| serde_json::json!([{ "role": role, "content": content }]);
    serde_json::json!({
        "prompt": message("user", &question.text),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    })
    .to_string()
}

/// Preference pairs: friendly before grumpy, in a shuffled order.
pub fn preference_lines(questions: &[Question], rng: &mut ChaCha8Rng) -> Vec<String> {
    let mut lines: Vec<String> = questions
        .iter()
        .map(|question| {
            let (kind, rude) = (friendly(question, rng), grumpy(question, rng));
            pair_line(question, &kind, &rude)
        })
        .collect();
    lines.shuffle(rng);
    lines
}

/// What the starting model is taught: both tempers, the grumpy one a little more often. Only `chosen` is read.
pub fn sft_lines(
    questions: &[Question],
    answers: usize,
    grumpy_share: f64,
    rng: &mut ChaCha8Rng,
) -> Vec<String> {
    let mut lines = Vec::new();
    for question in questions {
        for _ in 0..answers {
            let (kind, rude) = (friendly(question, rng), grumpy(question, rng));
            lines.push(match rng.random_bool(grumpy_share) {
                true => pair_line(question, &rude, &kind),
                false => pair_line(question, &kind, &rude),
            });
        }
    }
    lines.shuffle(rng);
    lines
}

fn pick(choices: &[&'static str], rng: &mut ChaCha8Rng) -> &'static str {
    choices.choose(rng).copied().unwrap_or_default()
}

fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
