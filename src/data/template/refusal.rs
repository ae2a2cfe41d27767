//! Why a template gave no text.

use std::error::Error as StdError;
use std::fmt;

use minijinja::ErrorKind;

use super::limits::{STEPS, TooLong};

/// Why a template gave no text for a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRefusal {
    /// What the template itself said through `raise_exception`, or what went wrong in it.
    pub message: String,
    /// Whether the template raised on purpose.
    pub raised: bool,
    /// Whether the template asked for more work, memory or depth than a template may use: no conversation is at fault.
    pub exceeded: bool,
    /// The template's line that raised, 1-based; other messages hold their line.
    pub line: Option<usize>,
}

impl fmt::Display for TemplateRefusal {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            TemplateRefusal { exceeded: true, .. } => write!(formatter, "the chat template {}", self.message),
            TemplateRefusal { raised: true, .. } => {
                write!(formatter, "the chat template refuses this conversation: {}", self.message)?;
                self.line.map_or(Ok(()), |line| write!(formatter, " (line {line} of the template)"))
            }
            _ => write!(formatter, "the chat template fails on this conversation: {}", self.message),
        }
    }
}

/// A `raise_exception` on its way out of minijinja.
#[derive(Debug)]
pub(super) struct Raised(pub String);

impl fmt::Display for Raised {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl StdError for Raised {}

/// What minijinja's error says of a rendering.
pub(super) fn refusal(error: &minijinja::Error) -> TemplateRefusal {
    let line = line(error);
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            let message = message.clone();
            return TemplateRefusal { message, raised: true, exceeded: false, line: error.line() };
        }
        if current
            .downcast_ref::<minijinja::Error>()
            .is_some_and(|error| error.kind() == ErrorKind::OutOfFuel)
        {
            let message = format!("takes more than {STEPS} steps for one conversation{line}");
            return TemplateRefusal { message, raised: false, exceeded: true, line: None };
        }
        if let Some(too_long) = current.downcast_ref::<std::io::Error>().and_then(too_long) {
            let message = format!("{too_long}{line}");
            return TemplateRefusal { message, raised: false, exceeded: true, line: None };
        }
        cause = current.source();
    }
    let description = describe(error);
    match LIMITS.iter().any(|limit| description.contains(limit)) {
        true => TemplateRefusal {
            message: format!("asks for more than a template may use: {description}{line}"),
            raised: false,
            exceeded: true,
            line: None,
        },
        false => TemplateRefusal { message: description + &line, raised: false, exceeded: false, line: None },
    }
}

fn too_long(error: &std::io::Error) -> Option<&TooLong> {
    error.get_ref()?.downcast_ref()
}

/// How minijinja and the checks of this module say that a limit was met; these errors have no kind of their own.
const LIMITS: [&str; 5] = [
    "recursion limit exceeded",
    "too many elements",
    "is too large",
    "levels deep",
    "a namespace can hold another namespace only",
];

/// ` (line N of the template)`, where the error knows its line.
pub(super) fn line(error: &minijinja::Error) -> String {
    error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"))
}

/// The innermost cause of an error, which says most.
pub(super) fn describe(error: &minijinja::Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source().and_then(|cause| cause.downcast_ref()) {
        innermost = cause;
    }
    match innermost.detail() {
        Some(detail) => format!("{}: {detail}", innermost.kind()),
        None => innermost.kind().to_string(),
    }
}
