//! The emulated device's own cases (`tests/emulator`), compiled by nvcc and run on the PTX machine: a program that is linked
//! with the machine where others are linked with the CUDA runtime.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Mode, library};

/// nvcc makes PTX alone: nothing else of theirs is executed.
const FLAGS: [&str; 9] = [
    "-std=c++17",
    "-O2",
    "-lineinfo",
    "-Ikernels",
    "-Itests/emulator",
    "-gencode",
    "arch=compute_90a,code=compute_90a",
    "-Xcompiler",
    "-Wall,-Wextra",
];

/// A program of cases, and the folder with their PTX.
pub struct Cases {
    program: PathBuf,
    ptx: PathBuf,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

impl Cases {
    /// Compiles the cases of these files of `tests/emulator`, named without `.cu`; `None` without a cuobjdump to take the PTX out
    /// with. What was compiled before from the same files is kept.
    pub fn build(names: &[&str]) -> Option<Cases> {
        let _alone = library::building();
        let folder = root().join("tests/emulator");
        let kernels = root().join("kernels");
        let headers = [&folder, &kernels, &kernels.join("common")]
            .map(|folder| library::files(folder, &["h", "cuh"]))
            .concat();
        let sources: Vec<PathBuf> =
            names.iter().chain(&["registry"]).map(|name| folder.join(format!("{name}.cu"))).collect();
        let flags = FLAGS.map(str::to_owned);
        let objects = sources.iter().map(|source| object(source, &headers, &flags));
        let jobs: Vec<(&PathBuf, PathBuf)> = sources.iter().zip(objects).collect();
        library::compile(&jobs, &|| {
            let mut nvcc = Command::new(Path::new(library::TOOLKIT).join("bin/nvcc"));
            nvcc.current_dir(root()).args(&flags);
            nvcc
        });
        let objects: Vec<PathBuf> = jobs.into_iter().map(|(_, object)| object).collect();
        let main = root().join("tests/ptx_machine/cases/main.cpp");
        let machine = library::machine_objects();
        let key = library::hash_of(&[objects.clone(), machine.clone(), vec![main.clone()]].concat(), &[]);
        let ptx = library::extract_ptx_of(&objects, &library::hash_of(&objects, &[]))?;
        let program = library::folder().join(format!("cases-{key}"));
        if !program.exists() {
            let unfinished = program.with_extension(format!("{}", std::process::id()));
            let mut link = Command::new(library::compiler());
            link.args(["-std=c++20", "-O2", "-Wall", "-Wextra"]).arg(main).args(&objects).args(&machine);
            library::run(link.args(["-lpthread", "-o"]).arg(&unfinished));
            std::fs::rename(&unfinished, &program).expect("the program gets its name");
        }
        Some(Cases { program, ptx })
    }

    /// Runs cases, `!` after a name for the fault that it plants; of each the name and what went wrong, if anything.
    pub fn run(&self, mode: Mode, names: &[String]) -> Vec<(String, Option<String>)> {
        let numbers = [
            (mode.landing as u64).to_string(),
            mode.seed.to_string(),
            u8::from(mode.measured_rounding).to_string(),
        ];
        let output = Command::new(&self.program).arg(&self.ptx).args(numbers).args(names).output();
        let output = output.expect("the program of cases runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let mut outcomes: Vec<(String, Option<String>)> = Vec::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("ok ") {
                outcomes.push((name.to_owned(), None));
            } else if let Some((name, what)) =
                line.strip_prefix("FAILED ").and_then(|rest| rest.split_once(": "))
            {
                outcomes.push((name.to_owned(), Some(what.to_owned())));
            } else if let Some((_, Some(what))) = outcomes.last_mut() {
                // A report has several lines.
                what.push('\n');
                what.push_str(line);
            }
        }
        outcomes
    }
}

/// Where the object of a file of cases is, or will be.
fn object(source: &Path, headers: &[PathBuf], flags: &[String]) -> PathBuf {
    let key = library::hash_of(&[headers, &[source.to_owned()]].concat(), flags);
    library::folder().join(format!("case-{}-{key}.o", source.file_stem().unwrap_or_default().display()))
}

/// The cases of a file of `tests/emulator` that GPUs have too, by their names in its text.
pub fn names(file: &str) -> Vec<String> {
    let path = root().join("tests/emulator").join(format!("{file}.cu"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // What stands at a file's end for the emulated device alone.
    let text = text.split("#if MMPO_EMULATED").next().unwrap_or_default();
    let starts = text.lines().filter_map(|line| line.strip_prefix("CASE("));
    starts.filter_map(|rest| rest.split(')').next()).map(str::to_owned).collect()
}
