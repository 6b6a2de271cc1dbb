;; The core module of a handler written by hand, so that tests of the runtime need no compiler for another target.
;; What it does is chosen by the first byte of the task's kind; see the table in guests.rs.
  (import "context" "heartbeat" (func $heartbeat (param i32 i64 i32 i64 i32 i32 i32 i64) (result i32)))
  (import "context" "is-cancelled" (func $is_cancelled (param i32)))
  (import "context" "update-data" (func $update_data (param i32 i32 i32)))
  (import "context" "submit"
    (func $submit (param i32 i32 i32 i32 i32 i32 i32 i64 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
  (import "context" "deadline" (func $deadline (param i32)))
  (import "context" "created-at" (func $created_at (result i64)))
  (import "context" "max-attempts" (func $max_attempts (param i32)))
  (import "context" "setting" (func $setting (param i32 i32 i32)))
  (import "context" "settings" (func $settings (param i32)))
  (import "log" "enabled" (func $enabled (param i32) (result i32)))
  (import "log" "log" (func $log (param i32 i32 i32)))

  (import "room" "memory" (memory 1))
  (import "room" "next" (global $next (mut i32)))
  (global $calls (mut i32) (i32.const 0))
  ;; 0..512: what functions return. 512..: texts.
  (data (i32.const 512) "oops")
  (data (i32.const 520) "it went wrong")
  (data (i32.const 540) "a line of the log\n")
  (data (i32.const 560) "colour")

  (func $finish (param $at i32) (param $length i32) (result i32)
    (memory.fill (i32.const 0) (i32.const 0) (i32.const 64))
    (i32.store8 (i32.const 16) (i32.const 1))
    (i32.store (i32.const 20) (local.get $at))
    (i32.store (i32.const 24) (local.get $length))
    (i32.const 0))

  (func $finish_number (param $number i64) (result i32)
    (i64.store (i32.const 256) (local.get $number))
    (call $finish (i32.const 256) (i32.const 8)))

  ;; Case 1 is retry, case 2 release.
  (func $later (param $case i32) (param $has_delay i32) (param $delay i64) (result i32)
    (memory.fill (i32.const 0) (i32.const 0) (i32.const 64))
    (i32.store8 (i32.const 8) (local.get $case))
    (i32.store8 (i32.const 16) (local.get $has_delay))
    (i64.store (i32.const 24) (local.get $delay))
    (i32.const 0))

  ;; Kind 0 is retry, kind 1 reject.
  (func $fail (param $kind i32) (result i32)
    (memory.fill (i32.const 0) (i32.const 0) (i32.const 64))
    (i32.store8 (i32.const 0) (i32.const 1))
    (i32.store8 (i32.const 8) (local.get $kind))
    (i32.store (i32.const 12) (i32.const 512))
    (i32.store (i32.const 16) (i32.const 4))
    (i32.store (i32.const 20) (i32.const 520))
    (i32.store (i32.const 24) (i32.const 13))
    (i32.const 0))

  (func $beat (param $alive_ms i64) (result i32)
    (call $heartbeat
      (i32.const 1) (i64.const 1) (i32.const 1) (i64.const 2) (i32.const 520) (i32.const 13)
      (i64.ne (local.get $alive_ms) (i64.const 0)) (local.get $alive_ms)))

  (func $submit_one (param $key i32) (param $key_length i32) (param $data i32) (param $data_length i32)
    (call $submit
      (local.get $key) (local.get $key_length) (i32.const 512) (i32.const 4) (local.get $data) (local.get $data_length)
      (i32.const 0) (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 3) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 128)))

  ;; All that is left of what other instances wrote into this memory.
  (func $nonzero (result i64)
    (local $at i32) (local $end i32) (local $count i64)
    (local.set $at (i32.and (i32.add (global.get $next) (i32.const 4096)) (i32.const -8)))
    (local.set $end (i32.mul (memory.size) (i32.const 65536)))
    (loop $next
      (if (i64.ne (i64.load (local.get $at)) (i64.const 0)) (then (local.set $count (i64.add (local.get $count) (i64.const 1)))))
      (local.set $at (i32.add (local.get $at) (i32.const 8)))
      (br_if $next (i32.lt_u (local.get $at) (local.get $end))))
    (local.get $count))

  (func $spoil
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $next) (i32.const 4096)) (i32.const -8)))
    (memory.fill (local.get $at) (i32.const 170) (i32.sub (i32.mul (memory.size) (i32.const 65536)) (local.get $at))))

  (func $recurse (param $depth i64) (result i64)
    (i64.add (i64.const 1) (call $recurse (i64.add (local.get $depth) (i64.const 1)))))

  (func $allocate_until_refused
    (loop $more
      (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))))

  (func (export "handle")
    (param $key i32) (param $key_length i32) (param $kind i32) (param $kind_length i32) (param $data i32) (param $data_length i32)
    (param $has_user i32) (param $user i32) (param $user_length i32) (param $attempt i32) (result i32)
    (local $what i32) (local $count i64)
    (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
    (local.set $what (i32.load8_u (local.get $kind)))
    (if (i32.eq (local.get $what) (i32.const 0x66)) (then ;; f
      (return (call $finish (local.get $data) (local.get $data_length)))))
    (if (i32.eq (local.get $what) (i32.const 0x72)) (then ;; r
      (return (call $later (i32.const 1) (i32.const 1) (i64.const 5000)))))
    (if (i32.eq (local.get $what) (i32.const 0x52)) (then ;; R
      (return (call $later (i32.const 1) (i32.const 1) (i64.const -1)))))
    (if (i32.eq (local.get $what) (i32.const 0x6c)) (then ;; l
      (return (call $later (i32.const 2) (i32.const 0) (i64.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x65)) (then ;; e
      (return (call $fail (i32.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x6a)) (then ;; j
      (return (call $fail (i32.const 1)))))
    (if (i32.eq (local.get $what) (i32.const 0x74)) (then ;; t
      (unreachable)))
    (if (i32.eq (local.get $what) (i32.const 0x77)) (then ;; w
      (loop $for_ever (br $for_ever))))
    (if (i32.eq (local.get $what) (i32.const 0x78)) (then ;; x
      (return (call $finish_number (call $recurse (i64.const 0))))))
    (if (i32.eq (local.get $what) (i32.const 0x61)) (then ;; a
      (call $allocate_until_refused) (unreachable)))
    (if (i32.eq (local.get $what) (i32.const 0x79)) (then ;; y
      (call $allocate_until_refused)
      (loop $for_ever (br $for_ever))))
    (if (i32.eq (local.get $what) (i32.const 0x41)) (then ;; A
      (call $allocate_until_refused)
      (return (call $fail (i32.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x6d)) (then ;; m
      (drop (memory.grow (i32.const 944)))
      (loop $fill
        (call $spoil)
        (br $fill))))
    (if (i32.eq (local.get $what) (i32.const 0x4d)) (then ;; M
      (drop (memory.grow (i32.const 16000)))
      (call $spoil)))
    (if (i32.eq (local.get $what) (i32.const 0x67)) (then ;; g
      (loop $log_more
        (call $log (i32.const 2) (i32.const 540) (i32.const 17))
        (br $log_more))))
    (if (i32.eq (local.get $what) (i32.const 0x47)) (then ;; G
      (call $log (i32.const 0) (i32.const 540) (i32.const 17))
      (call $log (i32.const 4) (i32.const 540) (i32.const 17))
      (return (call $finish (i32.const 0) (i32.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x68)) (then ;; h
      (return (call $finish_number (i64.extend_i32_u (call $beat (i64.const 90000)))))))
    (if (i32.eq (local.get $what) (i32.const 0x63)) (then ;; c
      (loop $wait
        (call $is_cancelled (i32.const 128))
        (br_if $wait (i32.eqz (i32.load8_u (i32.const 128)))))
      (return (call $later (i32.const 2) (i32.const 0) (i64.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x75)) (then ;; u
      (call $update_data (local.get $data) (local.get $data_length) (i32.const 128))
      (if (i32.load8_u (i32.const 128)) (then
        (return (call $finish (i32.load (i32.const 132)) (i32.load (i32.const 136))))))
      (return (call $finish (i32.const 0) (i32.const 0)))))
    (if (i32.or (i32.eq (local.get $what) (i32.const 0x73)) (i32.eq (local.get $what) (i32.const 0x53))) (then ;; s and S
      (call $submit_one (local.get $key) (local.get $key_length) (local.get $data) (local.get $data_length))
      (if (i32.load8_u (i32.const 128)) (then
        (return (call $finish (i32.load (i32.const 132)) (i32.load (i32.const 136))))))
      (if (i32.eq (local.get $what) (i32.const 0x53)) (then (unreachable)))
      (return (call $finish (i32.const 0) (i32.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x46)) (then ;; F
      (loop $submit_more
        (call $submit_one (local.get $key) (local.get $key_length) (local.get $data) (local.get $data_length))
        (local.set $count (i64.add (local.get $count) (i64.const 1)))
        (br_if $submit_more (i32.eqz (i32.load8_u (i32.const 128)))))
      (return (call $finish (i32.load (i32.const 132)) (i32.load (i32.const 136))))))
    (if (i32.eq (local.get $what) (i32.const 0x64)) (then ;; d
      (call $deadline (i32.const 128))
      (if (i32.load8_u (i32.const 128)) (then
        (return (call $finish_number (i64.load (i32.const 136))))))
      (return (call $finish (i32.const 0) (i32.const 0)))))
    (if (i32.eq (local.get $what) (i32.const 0x62)) (then ;; b
      (return (call $finish_number (call $created_at)))))
    (if (i32.eq (local.get $what) (i32.const 0x6b)) (then ;; k
      (call $setting (i32.const 560) (i32.const 6) (i32.const 128))
      (return (call $finish (i32.load (i32.const 132)) (i32.load (i32.const 136))))))
    (if (i32.eq (local.get $what) (i32.const 0x4b)) (then ;; K
      (call $settings (i32.const 128))
      (call $max_attempts (i32.const 136))
      (return (call $finish_number (i64.or
        (i64.extend_i32_u (i32.load (i32.const 132)))
        (i64.or
          (i64.shl (i64.extend_i32_u (i32.load8_u (i32.const 136))) (i64.const 8))
          (i64.or
            (i64.shl (i64.extend_i32_u (call $enabled (i32.const 1))) (i64.const 16))
            (i64.shl (i64.extend_i32_u (call $enabled (i32.const 2))) (i64.const 24)))))))))
    (if (i32.eq (local.get $what) (i32.const 0x6e)) (then ;; n
      (return (call $finish_number (i64.extend_i32_u (global.get $calls))))))
    (if (i32.eq (local.get $what) (i32.const 0x69)) (then ;; i
      (drop (memory.grow (i32.const 16)))
      (local.set $count (call $nonzero))
      (call $spoil)
      (return (call $finish_number (local.get $count)))))
    (if (i32.eq (local.get $what) (i32.const 0x6f)) (then ;; o
      (drop (memory.grow (i32.const 400)))
      (return (call $finish (i32.const 0) (i32.mul (memory.size) (i32.const 65536))))))
    (return (call $fail (i32.const 1))))
