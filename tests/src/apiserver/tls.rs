//! Certificates for API servers and their clients, and a server that shows another one when it is told to.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;

/// A CA that signs certificates of servers and of clients.
pub struct Ca(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key, in PEM.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The certificate in DER.
    pub der: Vec<u8>,
}

impl Ca {
    /// A new one.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().context("a key for a CA")?;
        Ok(Self(CertifiedIssuer::self_signed(params, key).context("a CA")?))
    }

    /// Its certificate in PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for a server with these names, which may be addresses.
    pub fn server(&self, names: &[&str]) -> Result<Pair> {
        self.sign(names, "kube-apiserver", ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A certificate for a client.
    pub fn client(&self, name: &str) -> Result<Pair> {
        self.sign(&[], name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(&self, names: &[&str], common: &str, usage: ExtendedKeyUsagePurpose) -> Result<Pair> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).context("names for a certificate")?;
        params.distinguished_name.push(rcgen::DnType::CommonName, common);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().context("a key")?;
        let certificate = params.signed_by(&key, &self.0).context("signing a certificate")?;
        Ok(Pair::new(&certificate, &key))
    }
}

impl Pair {
    fn new(certificate: &rcgen::Certificate, key: &KeyPair) -> Self {
        let der = certificate.der().to_vec();
        Self { certificate: certificate.pem(), key: key.serialize_pem(), der }
    }

    /// A certificate that signs itself and says that it is a CA, as some installers make them.
    pub fn own_ca(address: IpAddr) -> Result<Self> {
        let mut params = CertificateParams::new(vec![address.to_string()]).context("a name")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().context("a key")?;
        Ok(Self::new(&params.self_signed(&key).context("signing a certificate by itself")?, &key))
    }

    /// How a server speaks that shows this certificate, and wants one of this CA from its clients if there is one.
    pub(super) fn config(&self, clients: Option<&Ca>) -> Result<Arc<rustls::ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .context("protocol versions")?;
        let builder = match clients {
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                roots.add(ca.0.der().clone()).context("the clients' CA")?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().context("a verifier for clients")?)
            }
            None => builder.with_no_client_auth(),
        };
        let key = KeyPair::from_pem(&self.key).context("reading a key")?.serialize_der();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let chain = vec![CertificateDer::from(self.der.clone())];
        let mut config = builder.with_single_cert(chain, key).context("a server's certificate")?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}
