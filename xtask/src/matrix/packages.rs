//! Debian's kernels, by the ordinary package client, without touching what the machine has set up or installed: apt
//! runs on sources and lists of its own in `target/matrix`.
//!
//! Which builds there are changes weekly, and old ones vanish: the newest of a series is looked up each time.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::Series;
use crate::cmd;

/// A kernel that was unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` prints it.
    pub(super) release: String,
    /// The package's version: `5.10.262-1`.
    pub(super) version: String,
    /// Where its packages were unpacked.
    pub(super) root: PathBuf,
}

/// Small kernels for virtual machines, made from the same source with the same settings for networks.
const FLAVOUR: &str = "cloud-amd64";
/// The suites that have the series: the oldest one that Debian looks after, up to what is not released yet.
const SUITES: [&str; 5] = ["bullseye", "bookworm", "trixie", "trixie-backports", "sid"];
/// Of those, the ones with security updates.
const SECURITY: [&str; 3] = ["bullseye-security", "bookworm-security", "trixie-security"];
/// The keys that sign them, in the package debian-archive-keyring.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];
/// Lists that are younger are not fetched again.
const FRESH: Duration = Duration::from_secs(12 * 3600);

/// The newest kernel of each series, unpacked; what is there already is not downloaded again.
pub(super) fn fetch(series: &[Series]) -> Result<Vec<Kernel>> {
    let apt = Apt::open()?;
    apt.update()?;
    let images = apt.images()?;
    series.iter().map(|series| apt.kernel(pick(&images, series)?)).collect()
}

/// apt with sources, lists and a cache of its own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn open() -> Result<Self> {
        if cmd::find("apt-get", &[]).is_none() || cmd::find("dpkg-deb", &[]).is_none() {
            bail!(
                "the kernels that are tried are Debian's packages: run this where apt-get and dpkg-deb are"
            );
        }
        let apt = Self { directory: super::directory().join("apt") };
        for folder in ["lists/partial", "cache/archives/partial"] {
            let path = apt.directory.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("could not create {}", path.display()))?;
        }
        let known =
            cmd::output(&mut cmd::with("apt-get", ["indextargets", "--format", "$(REPO_URI) $(RELEASE)"]))?;
        let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).is_file());
        let keyring = keyring.context("no keys of Debian's archive here: install debian-archive-keyring")?;
        apt.write_sources(&sources(&known, keyring)?)?;
        Ok(apt)
    }

    fn sources(&self) -> PathBuf {
        self.directory.join("sources.list")
    }

    /// Lists of other sources are no lists of these.
    fn write_sources(&self, text: &str) -> Result<()> {
        let path = self.sources();
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        // An error: there was none.
        fs::remove_file(self.stamp()).ok();
        fs::write(&path, text).with_context(|| format!("could not write {}", path.display()))
    }

    /// Made anew with each update.
    fn stamp(&self) -> PathBuf {
        self.directory.join("updated")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::SourceList", self.sources().display().to_string()),
            ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
            ("Dir::State::Lists", self.directory.join("lists").display().to_string()),
            ("Dir::State::status", "/dev/null".to_owned()),
            ("Dir::Cache", self.directory.join("cache").display().to_string()),
            // A user of its own could not write here.
            ("APT::Sandbox::User", "root".to_owned()),
            // What an old suite says is not renewed, and stays true.
            ("Acquire::Check-Valid-Until", "false".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".to_owned()),
            ("Acquire::Retries", "3".to_owned()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command
    }

    fn update(&self) -> Result<()> {
        let stamp = self.stamp();
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age < FRESH) {
            return Ok(());
        }
        println!("$ apt-get update, for the suites {}", SUITES.join(", "));
        let mut command = self.command("apt-get");
        command.args(["-o", "APT::Update::Error-Mode=any", "update", "--quiet"]);
        cmd::output(&mut command).context("Debian's lists of packages cannot be had")?;
        fs::write(&stamp, "").with_context(|| format!("could not write {}", stamp.display()))
    }

    /// Every image there is.
    fn images(&self) -> Result<Vec<String>> {
        let pattern = format!("^linux-image-[0-9].*-{FLAVOUR}$");
        let found = cmd::output(self.command("apt-cache").args(["search", "--names-only", &pattern]))?;
        Ok(found.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    }

    fn has(&self, package: &str) -> bool {
        // Of a package that others only name it says nothing, and calls that a success.
        let about = cmd::output(self.command("apt-cache").args(["show", "--no-all-versions", package]));
        about.is_ok_and(|about| field(&about, "Version").is_some())
    }

    /// Downloads an image with the packages that it is made of, and unpacks them.
    fn kernel(&self, image: &str) -> Result<Kernel> {
        let release = image.trim_start_matches("linux-image-").to_owned();
        let about = cmd::output(self.command("apt-cache").args(["show", "--no-all-versions", image]))?;
        let version = field(&about, "Version").with_context(|| format!("{image} has no version"))?.to_owned();
        let root = super::directory().join("kernels").join(format!("{release}_{version}"));
        let kernel = Kernel { release, version, root };
        if kernel.root.is_dir() {
            return Ok(kernel);
        }
        let new = kernel.root.with_extension("new");
        // An error: there was none.
        fs::remove_dir_all(&new).ok();
        let downloads = new.join("packages");
        fs::create_dir_all(&downloads)
            .with_context(|| format!("could not create {}", downloads.display()))?;
        let (packages, gone): (Vec<_>, Vec<_>) =
            parts(&about, image, &kernel.release).into_iter().partition(|package| self.has(package));
        if !gone.is_empty() {
            // The archive keeps some images longer than their smaller parts; whether it matters is seen right away.
            println!("without {}, which Debian has no more", gone.join(" "));
        }
        println!("$ apt-get download {}", packages.join(" "));
        cmd::output(self.command("apt-get").arg("download").args(&packages).current_dir(&downloads))
            .with_context(|| format!("Debian's kernel {} cannot be had", kernel.release))?;
        let files =
            fs::read_dir(&downloads).with_context(|| format!("could not list {}", downloads.display()))?;
        for file in files {
            let file = file.with_context(|| format!("could not list {}", downloads.display()))?.path();
            cmd::output(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&new))?;
        }
        fs::remove_dir_all(&downloads)
            .with_context(|| format!("could not remove {}", downloads.display()))?;
        fs::rename(&new, &kernel.root).with_context(|| format!("could not rename {}", new.display()))?;
        Ok(kernel)
    }
}

impl Kernel {
    /// The kernel itself: /boot, or beside its modules.
    pub(super) fn image(&self) -> Result<PathBuf> {
        let places = [
            self.root.join("boot").join(format!("vmlinuz-{}", self.release)),
            self.modules()?.join("vmlinuz"),
        ];
        let found = places.iter().find(|path| path.is_file()).cloned();
        found.with_context(|| format!("the packages of {} hold no kernel", self.release))
    }

    /// Where its modules are.
    pub(super) fn modules(&self) -> Result<PathBuf> {
        let places =
            ["usr/lib/modules", "lib/modules"].map(|folder| self.root.join(folder).join(&self.release));
        let found = places.into_iter().find(|path| path.join("kernel").is_dir());
        found.with_context(|| format!("the packages of {} hold no modules", self.release))
    }
}

/// A list of sources for every suite, at the places from which this machine takes its own packages, said by `known` as
/// "place suite" a line.
fn sources(known: &str, keyring: &str) -> Result<String> {
    let place = |wanted: fn(&str) -> bool| {
        known
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(_, suite)| wanted(suite))
            .map(|(at, _)| at)
    };
    let archive = place(|suite| SUITES.contains(&suite) || matches!(suite, "stable" | "testing" | "forky"));
    let Some(archive) = archive else {
        bail!(
            "the kernels that are tried are Debian's, and this machine does not take packages from Debian's archive \
             (/etc/apt/sources.list.d)"
        );
    };
    let line = |at: &str, suite: &str| format!("deb [signed-by={keyring}] {at} {suite} main\n");
    let mut text: String = SUITES.iter().map(|suite| line(archive, suite)).collect();
    if let Some(security) = place(|suite| suite.ends_with("-security")) {
        text.extend(SECURITY.iter().map(|suite| line(security, suite)));
    }
    Ok(text)
}

/// The image with the highest numbers.
fn pick<'a>(images: &'a [String], series: &Series) -> Result<&'a str> {
    let of_series = |image: &&String| match series {
        Series::Newest => numbers(image).len() > 2,
        Series::Of(wanted) => numbers(image).len() > 2 && numbers(image).starts_with(&numbers(wanted)),
    };
    let found = images.iter().filter(of_series).max_by_key(|image| numbers(image));
    found.map(String::as_str).with_context(|| {
        let mut all: Vec<_> = images.iter().map(|image| numbers(image)).collect();
        all.sort();
        let mut all: Vec<String> =
            all.iter().filter_map(|all| Some(format!("{}.{}", all.first()?, all.get(1)?))).collect();
        all.dedup();
        let wanted = match series {
            Series::Of(series) => series,
            Series::Newest => "any series",
        };
        format!("Debian has no kernel of {wanted} any more; there are {}", all.join(", "))
    })
}

/// The numbers of a version, in order: those that a letter stands before name a release of Debian, not a kernel.
fn numbers(text: &str) -> Vec<u32> {
    let version = text.trim_start_matches("linux-image-").trim_end_matches(&format!("-{FLAVOUR}"));
    version.split(['.', '-', '+']).filter_map(|part| part.parse().ok()).collect()
}

/// The value of a field in a package's description.
fn field<'a>(about: &'a str, name: &str) -> Option<&'a str> {
    about.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The image and those of the packages it depends on that are of the same release: since 6.19 it is in parts.
fn parts(about: &str, image: &str, release: &str) -> Vec<String> {
    let depends = field(about, "Depends").unwrap_or_default();
    let names = depends.split([',', '|']).filter_map(|one| one.split_whitespace().next());
    let mut parts = vec![image.to_owned()];
    parts.extend(names.filter(|name| name.ends_with(release)).map(str::to_owned));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_found_among_old_and_foreign_builds() {
        let images = [
            "linux-image-5.10.0-30-cloud-amd64",
            "linux-image-5.10.0-46-cloud-amd64",
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-0.deb11.52-cloud-amd64",
            "linux-image-6.12.90+deb13-cloud-amd64",
            "linux-image-6.12.118+deb13-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
        ]
        .map(str::to_owned);
        let pick = |series: &str| pick(&images, &Series::Of(series.to_owned())).map(str::to_owned);
        assert_eq!(pick("5.10").unwrap(), images[1]);
        assert_eq!(pick("6.1").unwrap(), images[3]);
        assert_eq!(pick("6.12").unwrap(), images[6]);
        assert_eq!(super::pick(&images, &Series::Newest).unwrap(), images[6]);
        let error = pick("5.15").unwrap_err().to_string();
        assert!(error.contains("5.15") && error.ends_with("5.10, 6.1, 6.12"), "{error}");
    }

    #[test]
    fn sources_are_those_of_the_machine_with_other_suites() {
        let known = "http://mirror/debian/ bookworm\nhttp://mirror/debian/ bookworm-updates\n\
                     http://safe/debian-security/ bookworm-security\n";
        let text = sources(known, "/keys").unwrap();
        assert!(text.contains("deb [signed-by=/keys] http://mirror/debian/ sid main\n"), "{text}");
        assert!(text.contains("deb [signed-by=/keys] http://safe/debian-security/ bullseye-security main\n"));
        let error = sources("http://mirror/other/ noble\n", "/keys").unwrap_err().to_string();
        assert!(error.contains("Debian's archive"), "{error}");
    }

    #[test]
    fn an_image_in_parts_is_fetched_with_its_parts() {
        let about = "Package: x\nVersion: 7.3.4-1\nDepends: dracut | tools (>= 0.1), linux-base-7.3.4-cloud (= 7.3.4-1), \
                     linux-modules-7.3.4-cloud (= 7.3.4-1)\n";
        assert_eq!(field(about, "Version"), Some("7.3.4-1"));
        assert_eq!(
            parts(about, "linux-image-7.3.4-cloud", "7.3.4-cloud"),
            ["linux-image-7.3.4-cloud", "linux-base-7.3.4-cloud", "linux-modules-7.3.4-cloud"]
        );
    }
}
