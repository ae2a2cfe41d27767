//! `mmpo-fast report`: the page of a run again from what its folder holds, or one page of several runs.

use std::path::{Path, PathBuf};

use crate::checkpoint::atomic::{self, kind_of};
use crate::config::ReportConfig;
use crate::error::{Error, Result};
use crate::report::{MOST_RUNS, NamedRun, REPORT_FILE, RunReport, RunState, comparison_page, print_result};
use crate::train::RunLock;

/// The page of several runs, where no name is given.
const COMPARISON_FILE: &str = "comparison.html";

/// Writes the page of `config`'s runs.
///
/// # Errors
/// [`Error::Config`] for a folder that holds no run, for too many runs and for a page that cannot be where it is asked for;
/// [`Error::Io`] and [`Error::Data`] of the runs' files.
pub fn run(config: &ReportConfig) -> Result<()> {
    let folders = &config.folders;
    if folders.len() > MOST_RUNS {
        return Err(Error::config(
            format!("{} runs are too many for one page", folders.len()),
            format!("compare up to {MOST_RUNS} at a time: more lines cannot be told apart"),
        ));
    }
    let page = match (&config.output, folders.as_slice()) {
        (Some(page), _) => page.clone(),
        (None, [folder]) => folder.join(REPORT_FILE),
        (None, _) => PathBuf::from(COMPARISON_FILE),
    };
    if let Ok(metadata) = std::fs::metadata(&page)
        && !metadata.is_file()
    {
        return Err(Error::config(
            format!("`--output` = {} is {}, not a file", page.display(), kind_of(&metadata)),
            "name a file that may be written or replaced",
        ));
    }
    let html = match folders.as_slice() {
        [folder] => read(folder)?.to_html()?,
        folders => {
            check_distinct(folders)?;
            comparison_page(&named(folders)?)?
        }
    };
    atomic::write_file(&page, html.as_bytes())?;
    print_result(&format!("report  {}\n", page.display()))?;
    Ok(())
}

/// Refuses a run that is named twice: its lines would lie over each other under one name.
fn check_distinct(folders: &[PathBuf]) -> Result<()> {
    let real = |folder: &PathBuf| std::fs::canonicalize(folder).unwrap_or_else(|_| folder.clone());
    let reals: Vec<PathBuf> = folders.iter().map(real).collect();
    for (at, folder) in folders.iter().enumerate() {
        if let Some(first) = reals[..at].iter().position(|other| *other == reals[at]) {
            let (first, second) = (folders[first].display(), folder.display());
            return Err(Error::config(
                format!("{first} and {second} are one run, which cannot be compared with itself"),
                "name each run once",
            ));
        }
    }
    Ok(())
}

/// The run in `folder`, as it stands now.
fn read(folder: &Path) -> Result<RunReport> {
    let mut report = RunReport::read(folder)?;
    // While a run is written somebody has its lock.
    if report.facts.state == RunState::Running && RunLock::check(folder).is_ok() {
        let why = "its process ended before it wrote a report: it was killed, or failed at its end. `--resume` goes on after \
                   the newest checkpoint";
        report.facts.state = RunState::Stopped(why.to_string());
    }
    Ok(report)
}

/// The runs, each by the name of its folder, or by its path where two folders have the same name.
fn named(folders: &[PathBuf]) -> Result<Vec<NamedRun>> {
    let name = |folder: &PathBuf| {
        let real = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.clone());
        real.file_name()
            .map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
    };
    let names: Vec<String> = folders.iter().map(name).collect();
    let run = |(folder, name): (&PathBuf, &String)| {
        let is_one = names.iter().filter(|other| *other == name).count() == 1;
        let name = if is_one { name.clone() } else { folder.display().to_string() };
        Ok(NamedRun { name, report: read(folder)? })
    };
    folders.iter().zip(&names).map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_named_twice_is_refused_under_whatever_spelling() {
        let place = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| place.path().join(name));
        for folder in [&one, &other] {
            std::fs::create_dir(folder).unwrap();
        }
        let link = place.path().join("link");
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert!(check_distinct(&[one.clone(), other.clone()]).is_ok());
        for spelling in [one.clone(), link, other.join("../one/")] {
            let error = check_distinct(&[one.clone(), other.clone(), spelling.clone()]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(&spelling.display().to_string()), "{error}");
        }
        // A folder that is not there is named when it is read.
        assert!(check_distinct(&[place.path().join("absent"), one]).is_ok());
    }
}
