//! kube-proxy's settings: those of the flags, or those of the file that replaces them (F-1).

use super::kube_proxy::fields::{self, Origin};
use super::kube_proxy::file;
use super::kube_proxy::v1alpha1::Nftables;
use super::{ConfigErrors, ConfigFile, FlagError, Host, KubeProxyConfiguration, RunArgs};

/// kube-proxy's settings, from flags or from a file.
pub(super) struct Input {
    pub(super) kube: KubeProxyConfiguration,
    pub(super) file: Option<ConfigFile>,
    pub(super) warnings: Vec<String>,
}

impl Input {
    /// The file replaces what flags say (F-1); without one the flags count.
    pub(super) fn new(args: &RunArgs, host: &dyn Host) -> Result<Self, ConfigErrors> {
        // An empty value is what templates leave of an unset option.
        let Some(path) = args.config.as_ref().filter(|path| !path.as_os_str().is_empty()) else {
            let mut kube = args.kube_proxy.clone();
            let warnings = useless(&kube, Origin::Flags).into_iter().collect();
            kube.nftables = Nftables::from(&kube.iptables); // F-10: the flags mean every mode's section.
            return Ok(Self { kube, file: None, warnings });
        };
        let wrong = |reason| {
            let value = path.display().to_string();
            ConfigErrors(vec![FlagError { flag: "--config", value, reason }])
        };
        let text = host.read(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
        let file::Decoded { configuration: kube, warnings } = file::decode(&text).map_err(wrong)?;
        let mut warnings: Vec<String> =
            warnings.into_iter().map(|warning| format!("{}: {warning}", path.display())).collect();
        warnings.extend(useless(&kube, Origin::File));
        let overruled = fields::overruled(&args.kube_proxy);
        if !overruled.is_empty() {
            warnings.push(format!("--config overrules these flags: {}", overruled.join(", ")));
        }
        Ok(Self { kube, file: Some(ConfigFile { path: path.clone(), text }), warnings })
    }

    /// Where they come from.
    pub(super) fn origin(&self) -> Origin {
        if self.file.is_some() { Origin::File } else { Origin::Flags }
    }
}

/// Says once what was set in vain.
fn useless(kube: &KubeProxyConfiguration, origin: Origin) -> Option<String> {
    let settings = fields::without_effect(kube, origin);
    (!settings.is_empty()).then(|| format!("these settings have no effect here: {}", settings.join(", ")))
}
