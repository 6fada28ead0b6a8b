//! The XenBus state machine and xenstore keys.
