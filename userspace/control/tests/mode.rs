// SPDX-License-Identifier: MIT OR Apache-2.0
//! Permission to connect to a socket. Alone in its program, because the umask is the whole program's.

use control::socket::listen_at;
use rustix::fs::Mode;
use rustix::process::umask;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

#[test]
fn mode_of_a_socket_is_what_was_said() {
    let folder = std::env::temp_dir().join(format!("control-mode-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (number, (mask, mode)) in [(0, 0o600), (0o077, 0o660), (0o777, 0o600)]
        .into_iter()
        .enumerate()
    {
        let path = folder.join(number.to_string());
        let before = umask(Mode::from_raw_mode(mask));
        let listener = listen_at(&path, mode);
        umask(before);
        let found = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode, "with the umask {mask:o}");
        UnixStream::connect(&path).unwrap();
        listener.unwrap().accept().unwrap();
    }
    std::fs::remove_dir_all(folder).unwrap();
}
