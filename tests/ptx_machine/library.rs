//! Compiles and links the machine, and takes the PTX out of the kernels' objects. Both are kept below the target folder and
//! made again when what they are made of changes.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The toolkit that the kernels were compiled with.
pub const TOOLKIT: &str = env!("MMPO_FAST_TOOLKIT");
/// Where the build left the archive of the kernels' objects.
const BUILD: &str = env!("OUT_DIR");
/// Where it keeps the objects.
const OBJECTS: &str = env!("MMPO_FAST_KERNEL_OBJECTS");

/// Sums keep their order and no product is fused unless PTX says so: contraction is off. An AVX2 processor does eight lanes at
/// a time, in loops that the compiler makes vectors of from `-O3` on; others run the same code more slowly.
const FLAGS: [&str; 9] = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Werror=return-type",
];

/// Held by whoever makes files here: the tests of one process run side by side.
pub fn building() -> MutexGuard<'static, ()> {
    static BUILDING: Mutex<()> = Mutex::new(());
    BUILDING.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx_machine");
    std::fs::create_dir_all(&folder).expect("a folder for the machine");
    folder
}

/// The files of a folder with one of these endings, sorted.
pub fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a folder's entry").path())
        .filter(|path| {
            path.extension().and_then(OsStr::to_str).is_some_and(|ending| endings.contains(&ending))
        })
        .collect();
    found.sort();
    found
}

pub fn hash_of(paths: &[PathBuf], flags: &[String]) -> String {
    let mut hasher = DefaultHasher::new();
    flags.hash(&mut hasher);
    for path in paths {
        path.file_name().hash(&mut hasher);
        std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

pub fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned())
}

/// The machine's own objects.
pub fn machine_objects() -> Vec<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ptx_machine");
    let mut flags: Vec<String> = FLAGS.map(str::to_owned).to_vec();
    flags.push(format!("-I{TOOLKIT}/include"));
    if cfg!(target_arch = "x86_64") && std::arch::is_x86_feature_detected!("avx2") {
        flags.push("-march=x86-64-v3".to_owned());
    }
    let headers = files(&source, &["h"]);
    let sources = files(&source, &["cpp"]);
    let objects = sources.iter().map(|path| {
        let key = hash_of(&[headers.clone(), vec![path.clone()]].concat(), &flags);
        folder().join(format!("{}-{key}.o", path.file_stem().unwrap_or_default().display()))
    });
    let jobs: Vec<(&PathBuf, PathBuf)> = sources.iter().zip(objects).collect();
    compile(&jobs, &|| {
        let mut command = Command::new(compiler());
        command.args(&flags);
        command
    });
    jobs.into_iter().map(|(_, object)| object).collect()
}

/// The machine with the launchers in it, as the library that programs look for by the driver's name.
pub fn build() -> PathBuf {
    let objects = machine_objects();
    let archive = Path::new(BUILD).join("libmmpo_kernels_gpu.a");
    let library =
        folder().join(hash_of(&[objects.clone(), vec![archive.clone()]].concat(), &[])).join("libcuda.so");
    if !library.exists() {
        std::fs::create_dir_all(library.parent().expect("a folder")).expect("a folder for the library");
        let unfinished = library.with_extension(format!("{}", std::process::id()));
        // Programs look for this name first; the loader gives them what is loaded by it already.
        run(Command::new(compiler())
            .args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-o"])
            .arg(&unfinished)
            .args(&objects)
            .arg("-Wl,--whole-archive")
            .arg(&archive)
            .args(["-Wl,--no-whole-archive", "-lpthread"]));
        std::fs::rename(&unfinished, &library).expect("the library gets its name");
    }
    library
}

/// Makes of each source the object beside it, where there is none yet, by a command that takes `-c SOURCE -o OBJECT`; as many
/// at once as there are processors.
pub fn compile(jobs: &[(&PathBuf, PathBuf)], command: &(dyn Fn() -> Command + Sync)) {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((source, object)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if object.exists() {
                        continue;
                    }
                    let unfinished = object.with_extension(format!("{}", std::process::id()));
                    let mut command = command();
                    command.arg("-c").arg(source).arg("-o").arg(&unfinished);
                    let output = command.output().expect("a compiler runs");
                    if output.status.success() {
                        std::fs::rename(&unfinished, object).expect("the object gets its name");
                    } else {
                        let text = String::from_utf8_lossy(&output.stderr).into_owned();
                        failures.lock().expect("no panic holds it").push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no panic holds it");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn cuobjdump() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = vec![Path::new(TOOLKIT).join("bin/cuobjdump")];
    candidates.extend(std::env::split_paths(&path).map(|folder| folder.join("cuobjdump")));
    let found = candidates.into_iter().find(|candidate| candidate.exists());
    if found.is_none() {
        eprintln!("no cuobjdump (tools/setup_cuda.sh installs one): the PTX is not executed");
    }
    found
}

/// A folder with the PTX of every kernel file, as `NAME.sm_80.ptx` and `NAME.sm_90a.ptx`.
pub fn extract_ptx() -> Option<PathBuf> {
    let objects = Path::new(OBJECTS).join("gpu");
    let key = hash_of(&files(&objects, &["key"]), &[]);
    extract_ptx_of(&files(&objects, &["o"]), &key)
}

/// The same of other objects; `key` changes with what is in them.
pub fn extract_ptx_of(objects: &[PathBuf], key: &str) -> Option<PathBuf> {
    let cuobjdump = cuobjdump()?;
    let out = folder().join(format!("ptx-{key}"));
    if out.exists() {
        return Some(out);
    }
    let unfinished = out.with_extension(format!("{}", std::process::id()));
    std::fs::create_dir_all(&unfinished).expect("a folder for the PTX");
    for object in objects {
        let listing = run(Command::new(&cuobjdump).arg("-ptx").arg(object));
        let listing = String::from_utf8(listing).expect("PTX is text");
        let stem = object.file_stem().unwrap_or_default().to_string_lossy().replace("kernels-", "");
        for section in listing.split("Fatbin ptx code:").skip(1) {
            // After the PTX comes the next section, of machine code.
            let section = section.split("Fatbin elf code:").next().unwrap_or_default();
            let target = section.split("arch = ").nth(1).and_then(|rest| rest.split_whitespace().next());
            let text = section.find(".version").map(|start| &section[start..]);
            let (Some(target), Some(text)) = (target, text) else { panic!("{stem}: a section without PTX") };
            std::fs::write(unfinished.join(format!("{stem}.{target}.ptx")), text).expect("a file of PTX");
        }
    }
    // Another process may have been faster.
    if std::fs::rename(&unfinished, &out).is_err() {
        std::fs::remove_dir_all(&unfinished).expect("the folder goes");
    }
    Some(out)
}
