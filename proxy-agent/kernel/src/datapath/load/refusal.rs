//! A refused program, for people: three lines, and a file with everything the verifier said.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Where the log is kept: gone with the next boot, which may bring another kernel.
const DIRECTORY: &str = "/run/proxy-agent";
const FILE: &str = "verifier.log";
/// What is kept of a log: its end tells why.
const KEPT: usize = 1 << 20;
/// How long the verifier's word may be in a line for people.
const LINE: usize = 300;

/// Why a program was refused, and where more stands.
#[derive(Debug)]
pub struct Refusal {
    pub program: String,
    /// The last thing the verifier said; empty when it said nothing.
    pub said: String,
    /// The kernel's error.
    pub error: io::Error,
    /// Release of the kernel.
    pub kernel: String,
    /// Where the whole log is kept, or why it is not; `None` when there is none.
    pub log: Option<Result<PathBuf, String>>,
}

impl Refusal {
    /// A refusal with the log that came with it; a log that says more is asked for with `whole`, which may take its
    /// time. It is not asked where the kernel has refused without a look at the program.
    pub(crate) fn new(
        program: &str,
        error: io::Error,
        log: &str,
        whole: impl FnOnce() -> Option<String>,
    ) -> Self {
        let said = last_word(log).to_owned();
        let kernel = nix::sys::utsname::uname()
            .map(|names| names.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut refusal = Self { program: program.to_owned(), said, error, kernel, log: None };
        if !log.trim().is_empty() {
            // Too large or too complex: the path to there is the whole of it, and says nothing.
            let too_large = refusal.error.raw_os_error() == Some(libc::E2BIG);
            let whole = if too_large { None } else { whole() };
            refusal.log = Some(refusal.keep(Path::new(DIRECTORY), whole.as_deref().unwrap_or(log)));
        }
        refusal
    }

    /// Writes the end of a log to a file of this directory, for root alone: it shows addresses.
    fn keep(&self, directory: &Path, log: &str) -> Result<PathBuf, String> {
        let path = directory.join(FILE);
        let mut start = log.len().saturating_sub(KEPT);
        while !log.is_char_boundary(start) {
            start += 1;
        }
        let cut =
            if start == 0 { String::new() } else { format!("({start} bytes before this are left out)\n") };
        let text = format!(
            "proxy-agent {}, kernel {}, program {}: {}\n{cut}{}",
            env!("CARGO_PKG_VERSION"),
            self.kernel,
            self.program,
            self.error,
            log.get(start..).unwrap_or_default()
        );
        let write = || {
            fs::create_dir_all(directory)?;
            // What an earlier agent has left may be open, or be no file.
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            io::Write::write_all(&mut file, text.as_bytes())
        };
        write().map(|()| path.clone()).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self.error.raw_os_error() {
            Some(libc::EPERM) => {
                "run it as root with CAP_SYS_ADMIN and CAP_NET_ADMIN; a kernel in lockdown mode, or a sandbox that \
                 forbids bpf(2), loads none"
            }
            Some(libc::ENOMEM) => "free memory, or raise the limit of this process's cgroup",
            _ if self.said.is_empty() => {
                "use a kernel with CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_CGROUP_BPF"
            }
            _ => "use a kernel that README lists; if this is one, report it with that log",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { program, said, error, kernel, .. } = self;
        write!(f, "kernel {kernel} refused program {program}: ")?;
        match said.is_empty() {
            true => write!(f, "{error}")?,
            false => write!(f, "{said} ({error})")?,
        }
        match &self.log {
            None => {}
            Some(Ok(path)) => write!(f, "\nthe verifier's log: {}", path.display())?,
            Some(Err(why)) => write!(f, "\nthe verifier's log could not be kept in {why}")?,
        }
        write!(f, "\nwhat to do: {}", self.remedy())
    }
}

/// The last line of a verifier's log that is neither a count, nor an instruction, nor what was known before one: why it
/// gave up.
fn last_word(log: &str) -> &str {
    let counts =
        ["processed ", "verification time ", "stack depth ", "mark_precise", "peak_states", "max_states"];
    // "12: (79) r1 = …", "from 12 to 14: …", "; source", "R0=… R1=…", "func#1 @9", "last_idx 3 first_idx 0"
    let steps = ["from ", ";", "func#", "last_idx ", "regs=", "parent ", "Validating ", "propagating "];
    let is_word = |line: &&str| {
        !line.is_empty()
            && !counts.iter().chain(&steps).any(|start| line.starts_with(start))
            && !is_instruction(line)
            && !is_state(line)
    };
    let found = log.lines().map(str::trim).rfind(is_word).unwrap_or_default();
    match found.char_indices().nth(LINE) {
        Some((end, _)) => found.get(..end).unwrap_or_default(),
        None => found,
    }
}

fn is_instruction(line: &str) -> bool {
    line.split_once(':')
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn is_state(line: &str) -> bool {
    let register = |word: &str| word.starts_with('R') && word[1..].starts_with(|c: char| c.is_ascii_digit());
    let mut words = line.split_whitespace().filter(|word| word.contains('='));
    // "R1 type=scalar expected=fp" is why; "R0=scalar() R1_w=ctx()" is a state.
    line.split_whitespace().next().is_some_and(register) && words.next().is_some_and(register)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(error: i32, log: &str) -> Refusal {
        Refusal {
            program: "tc_ingress".to_owned(),
            said: last_word(log).to_owned(),
            error: io::Error::from_raw_os_error(error),
            kernel: "5.10.0-46".to_owned(),
            log: Some(Ok("/run/x/verifier.log".into())),
        }
    }

    #[test]
    fn the_reason_is_found_in_short_logs_and_in_long_ones() {
        for (log, word) in [
            ("", ""),
            (
                "R3 unbounded memory access, make sure to bounds check any such access\n\
                 verification time 1201 usec\nstack depth 56+0+128\n\
                 processed 712 insns (limit 1000000) max_states_per_insn 3 total_states 41 peak_states 41 mark_read 9\n",
                "R3 unbounded memory access, make sure to bounds check any such access",
            ),
            (
                "func#0 @0\n0: R1=ctx(off=0,imm=0) R10=fp0\n; let x = *p;\n0: (79) r1 = *(u64 *)(r2 +0)\n\
                 R2 !read_ok\nprocessed 1 insns (limit 1000000) max_states_per_insn 0\n",
                "R2 !read_ok",
            ),
            (
                "17: (85) call pc+4\nR1 type=scalar expected=fp\nCaller passes invalid args into func#1\n",
                "Caller passes invalid args into func#1",
            ),
            (
                "Arg#0 type PTR in cut_past() is not supported yet.\n\nfrom 3 to 5: R0=inv0\n R1_w=inv1 R2=ctx\n",
                "Arg#0 type PTR in cut_past() is not supported yet.",
            ),
            ("R1 type=inv expected=fp\n", "R1 type=inv expected=fp"),
        ] {
            assert_eq!(last_word(log), word, "{log}");
        }
        assert_eq!(last_word(&"é".repeat(1000)).chars().count(), LINE);
    }

    #[test]
    fn three_lines_say_which_program_why_where_more_stands_and_what_to_do() {
        let said = refusal(libc::EACCES, "R2 !read_ok\n").to_string();
        assert_eq!(
            said,
            "kernel 5.10.0-46 refused program tc_ingress: R2 !read_ok (Permission denied (os error 13))\n\
             the verifier's log: /run/x/verifier.log\n\
             what to do: use a kernel that README lists; if this is one, report it with that log"
        );
        let mut bare = refusal(libc::EPERM, "");
        bare.log = None;
        let said = bare.to_string();
        assert!(said.lines().count() == 2 && said.contains("CAP_SYS_ADMIN"), "{said}");
    }

    #[test]
    fn the_end_of_a_log_is_kept_for_root_and_an_older_one_goes() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("new");
        let refusal = refusal(libc::EACCES, "R2 !read_ok\n");
        refusal.keep(&directory, "first").unwrap();
        let log = format!("{}é{}the end", "x".repeat(KEPT), "y".repeat(KEPT - 8));
        let path = refusal.keep(&directory, &log).unwrap();
        let kept = fs::read_to_string(&path).unwrap();
        assert!(kept.len() < KEPT + 300 && kept.ends_with("the end"), "{}", kept.len());
        assert!(kept.starts_with("proxy-agent ") && kept.contains("kernel 5.10.0-46, program tc_ingress"));
        assert!(kept.contains("bytes before this are left out"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let why = refusal.keep(Path::new("/proc/none"), "x").unwrap_err();
        assert!(why.starts_with("/proc/none/verifier.log: "), "{why}");
    }

    #[test]
    fn nothing_more_is_asked_for_where_there_is_no_log_or_too_much_of_it() {
        let never = || -> Option<String> { panic!("asked") };
        let unasked = Refusal::new("x", io::Error::from_raw_os_error(libc::EPERM), " \n", never);
        assert!(unasked.log.is_none() && unasked.said.is_empty());
    }
}
