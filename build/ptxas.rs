//! What nvcc and ptxas said of every kernel: kept under `OUT_DIR/ptxas/`, and read for what must not be there.

use std::path::Path;

use crate::Result;
use crate::objects::Compiled;

/// Writes `<stem>.txt` for each file, and returns a line for every warning, register spill, stack frame and lost chance of speed.
pub fn review(compiled: &[Compiled], folder: &Path) -> Result<Vec<String>> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut findings = Vec::new();
    for file in compiled {
        let stem = file.source.file_stem().unwrap_or_default().to_string_lossy();
        let report = folder.join(format!("{stem}.txt"));
        std::fs::write(&report, &file.output).map_err(|error| format!("{}: {error}", report.display()))?;
        let found = findings_of(&file.output);
        findings.extend(found.into_iter().map(|finding| format!("{}: {finding}", file.source.display())));
    }
    Ok(findings)
}

/// What ptxas calls an information and is none: products of a warpgroup that wait for one another, register counts that
/// it does not honour.
const LOST_SPEED: [&str; 2] = ["Potential Performance Loss", "setmaxnreg' ignored"];

/// ptxas names a kernel and its target, then its stack and spills on a line of their own:
///
///     ptxas info    : Compiling entry function 'name' for 'sm_80'
///     ptxas info    : Function properties for name
///         0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
fn findings_of(output: &str) -> Vec<String> {
    let mut kernel = "";
    let mut findings = Vec::new();
    for line in output.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function ") {
            kernel = rest;
        } else if line.contains("bytes stack frame") {
            let clean = line.split(',').all(|part| part.trim_start().starts_with("0 bytes"));
            if !clean {
                findings.push(format!("{kernel}: {}", line.trim()));
            }
        } else if line.to_ascii_lowercase().contains("warning")
            || LOST_SPEED.iter().any(|text| line.contains(text))
        {
            findings.push(line.trim().to_owned());
        }
    }
    findings
}

/// What ptxas gave every kernel for every target, which the tests hold against a committed table: writes `resources.csv`
/// with file, kernel, target, registers, bytes of stack, of spills and of static shared memory, below a line that names the
/// compiler. The rows are sorted, so that two builds can be compared line by line.
pub fn write_resources(compiled: &[Compiled], nvcc: &str, folder: &Path) -> Result<()> {
    let mut rows: Vec<String> = compiled.iter().flat_map(resources_of).collect();
    rows.sort();
    rows.dedup();
    let mut text =
        format!("# nvcc {nvcc}\nfile,kernel,target,registers,stack,spill_stores,spill_loads,shared\n");
    for row in rows {
        text.push_str(&row);
        text.push('\n');
    }
    let path = folder.join("resources.csv");
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn resources_of(file: &Compiled) -> Vec<String> {
    let name = file.source.file_name().unwrap_or_default().to_string_lossy();
    let mut rows = Vec::new();
    let (mut kernel, mut target, mut memory) = (String::new(), "", [0; 3]);
    for line in file.output.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function ") {
            let quoted: Vec<&str> = rest.split('\'').collect();
            kernel = kernel_name(quoted.get(1).unwrap_or(&""));
            target = quoted.get(3).copied().unwrap_or_default();
        } else if line.contains("bytes stack frame") {
            for (memory, part) in memory.iter_mut().zip(line.split(',')) {
                *memory = leading_number(part);
            }
        } else if let Some((_, used)) = line.split_once(": Used ") {
            let shared = used.split(", ").find(|part| part.ends_with("bytes smem")).map_or(0, leading_number);
            let [stack, stores, loads] = memory;
            let registers = leading_number(used);
            // Template arguments hold commas.
            rows.push(format!("{name},\"{kernel}\",{target},{registers},{stack},{stores},{loads},{shared}"));
        }
    }
    rows
}

fn leading_number(text: &str) -> u32 {
    let digits = text.trim_start().split(|character: char| !character.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// `adamw_kernel<true>` of `_ZN40_GLOBAL__N__33b5038a_8_adamw_cu_01f8f83012adamw_kernelILb1EEEvP9mmpo_bf16`: without the
/// namespaces, one of which holds a hash, and without the parameters. What this does not read stays as it is.
fn kernel_name(mangled: &str) -> String {
    let Some(mut rest) = mangled.strip_prefix("_ZN") else { return mangled.to_owned() };
    let mut name = "";
    while let Some((identifier, after)) = identifier(rest) {
        (name, rest) = (identifier, after);
    }
    match rest.strip_prefix('I') {
        Some(arguments) => match template_arguments(arguments) {
            Some((arguments, _)) => format!("{name}<{arguments}>"),
            None => mangled.to_owned(),
        },
        None => name.to_owned(),
    }
}

/// `4nameREST` is `name` and `REST`.
fn identifier(text: &str) -> Option<(&str, &str)> {
    let digits = text.find(|character: char| !character.is_ascii_digit())?;
    let length: usize = text[..digits].parse().ok()?;
    Some((text.get(digits..digits + length)?, &text[digits + length..]))
}

/// Literals (`Lb1E`, `Li64E`), classes with or without a namespace and template arguments of their own, and single letters
/// for types of the language, up to the `E` that closes them.
fn template_arguments(mut text: &str) -> Option<(String, &str)> {
    let mut arguments = Vec::new();
    loop {
        if let Some(rest) = text.strip_prefix('E') {
            return Some((arguments.join(", "), rest));
        }
        let argument;
        (argument, text) = template_argument(text)?;
        arguments.push(argument);
    }
}

fn template_argument(text: &str) -> Option<(String, &str)> {
    if let Some(literal) = text.strip_prefix('L') {
        // An enumerator is written as its type and number.
        let (kind, rest) = match literal.strip_prefix('N') {
            Some(nested) => {
                let (name, rest) = nested_name(nested)?;
                (name, rest)
            }
            // A type that was named before, by its number.
            None if literal.starts_with('S') => (String::from("S"), literal.split_once('_')?.1),
            None => match identifier(literal) {
                Some((name, rest)) => (name.to_owned(), rest),
                None => (literal.get(..1)?.to_owned(), literal.get(1..)?),
            },
        };
        let (digits, rest) = rest.split_once('E')?;
        let value = match (kind.as_str(), digits) {
            ("b", "0") => "false".to_owned(),
            ("b", "1") => "true".to_owned(),
            (kind, digits) if kind.len() == 1 => digits.replace('n', "-"),
            (kind, digits) => format!("{kind} {digits}"),
        };
        return Some((value, rest));
    }
    if let Some(nested) = text.strip_prefix('N') {
        return nested_name(nested);
    }
    if let Some((name, rest)) = identifier(text) {
        return match rest.strip_prefix('I') {
            Some(arguments) => {
                let (arguments, rest) = template_arguments(arguments)?;
                Some((format!("{name}<{arguments}>"), rest))
            }
            None => Some((name.to_owned(), rest)),
        };
    }
    let letter = text.chars().next().filter(char::is_ascii_lowercase)?;
    let name = match letter {
        'f' => "float".to_owned(),
        other => other.to_string(),
    };
    Some((name, &text[1..]))
}

/// Behind `N`: `S_9SmallTileE`, a class of the kernel's own namespace.
fn nested_name(text: &str) -> Option<(String, &str)> {
    let mut rest = match text.strip_prefix('S') {
        Some(substitution) => substitution.split_once('_')?.1,
        None => text,
    };
    let mut name = String::new();
    while let Some((identifier, after)) = identifier(rest) {
        (name, rest) = (identifier.to_owned(), after);
    }
    if let Some(arguments) = rest.strip_prefix('I') {
        let (arguments, after) = template_arguments(arguments)?;
        (name, rest) = (format!("{name}<{arguments}>"), after);
    }
    Some((name, rest.strip_prefix('E')?))
}
