//! Verification of server certificates as in `kubectl`.
//!
//! One case more than rustls accepts: a self-signed certificate that is also the configured CA. rustls rejects it because it
//! is a CA; `kubectl` trusts it because it is configured. So it is accepted if it equals the configured one byte for byte,
//! has not expired, and has the server's name.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

#[derive(Debug)]
pub(super) struct KubectlVerifier {
    configured: Vec<CertificateDer<'static>>,
    webpki: Arc<WebPkiServerVerifier>,
}

impl KubectlVerifier {
    /// An error: none of these CAs can be used.
    pub(super) fn new(configured: &[Vec<u8>], provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let configured: Vec<CertificateDer<'static>> =
            configured.iter().cloned().map(CertificateDer::from).collect();
        let mut roots = RootCertStore::empty();
        let (_, unusable) = roots.add_parsable_certificates(configured.iter().cloned());
        if unusable > 0 {
            tracing::debug!("{unusable} certificates of the CA cannot be used");
        }
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        Ok(Self { configured, webpki: webpki.map_err(|error| error.to_string())? })
    }

    /// Whether the only error is that the certificate is a CA, and it is one of the configured ones. webpki raises that error
    /// after it has checked the time, and before the name.
    fn is_configured(&self, error: &Error, certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
        let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return false };
        let objection = other.0.downcast_ref::<webpki::Error>();
        matches!(objection, Some(webpki::Error::CaUsedAsEndEntity))
            && self.configured.iter().any(|configured| configured == certificate)
            && webpki::EndEntityCert::try_from(certificate)
                .is_ok_and(|certificate| certificate.verify_is_valid_for_subject_name(name).is_ok())
    }
}

impl ServerCertVerifier for KubectlVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.webpki.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(error) if self.is_configured(&error, certificate, name) => {
                Ok(ServerCertVerified::assertion())
            }
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    /// A self-signed certificate of a CA, valid from 2001 to 2002 if it is old.
    fn own_ca(name: &str, old: bool) -> Vec<u8> {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        if old {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn accepted(configured: &[Vec<u8>], shown: &[u8], name: &str) -> bool {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = KubectlVerifier::new(configured, &provider).unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let now = UnixTime::since_unix_epoch(
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap() + Duration::ZERO,
        );
        verifier.verify_server_cert(&CertificateDer::from(shown), &[], &name, &[], now).is_ok()
    }

    #[test]
    fn a_certificate_that_is_its_own_ca_counts_when_it_was_configured_and_for_its_name_and_time_alone() {
        let (own, other) = (own_ca("10.0.0.1", false), own_ca("10.0.0.1", false));
        assert!(accepted(std::slice::from_ref(&own), &own, "10.0.0.1"));
        assert!(accepted(&[other.clone(), own.clone()], &own, "10.0.0.1"));
        assert!(!accepted(std::slice::from_ref(&own), &own, "10.0.0.2"), "another name");
        assert!(!accepted(&[other], &own, "10.0.0.1"), "another certificate of the same name");
        let old = own_ca("10.0.0.1", true);
        assert!(!accepted(std::slice::from_ref(&old), &old, "10.0.0.1"), "out of its time");
    }
}
