#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    proxy_common_fuzz::packets(bytes);
});
