"""Chat templates that try to leave the sandbox, and a child process that renders them.

``python template_payloads.py FOLDER`` renders every payload with the tokenizer in FOLDER under an
audit hook, and prints one JSON object for each: its text or error, its time, and what it touched.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import time
from typing import Any

CANARY = "canary-3f1b77"
RAISE = "__jinja_exception__"

ATTRIBUTE_CHAINS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__()[0] }}",
    "{{ (1).__class__.__base__ }}{{ 1.5.__class__ }}",
    "{{ messages.__class__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages.__getitem__(0).__class__ }}",
    "{{ ''.__getattribute__('__class__') }}",
    "{{ messages[0].keys().__class__.__mro__ }}",
    "{{ messages[0]['__class__'] }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' ~ 'ss__'].__mro__ }}",
    "{{ tools.__class__ }}",
    "{{ range.__self__ }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ cycler('a').next.__globals__ }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
    "{{ joiner(',').__call__.__globals__ }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ lipsum.__globals__.os.environ }}",
    "{{ lipsum.__code__.co_consts }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now.__closure__ }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ undefined_name.__class__.__init__.__globals__ }}",
    "{{ undefined_name._fail_with_undefined_error.__globals__ }}",
    "{{ undefined_name._undefined_exception.mro() }}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ (messages | select).gi_code }}",
    "{{ (messages | batch(2)).gi_frame.f_back.f_builtins }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for m in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__init__.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% set x %}{{ lipsum }}{% endset %}{{ x.__class__.__mro__ }}",
    "{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}",
    "{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}{{ url_for.__globals__ }}",
    "{{ messages.__reduce_ex__(2) }}",
    "{{ ''.__\uff43lass__ }}",
]
ATTR_FILTERS = [
    "{{ '' | attr('__class__') | attr('__mro__') | last }}",
    "{{ '' | attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ '' | attr('_' * 2 ~ 'class' ~ '_' * 2) }}",
    "{{ lipsum | attr('__globals__') }}",
    "{{ dict | attr('__call__') | attr('__globals__') }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | map(attribute='__class__.__init__.__globals__') | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | sort(attribute='__class__.__name__') | length }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ messages | selectattr('__class__.__mro__') | list | length }}",
    "{{ messages | unique(attribute='__class__') | list | length }}",
    "{{ [lipsum] | map('attr', '__globals__') | list }}",
    "{% filter attr('__class__') %}x{% endfilter %}",
]
FORMAT_TRICKS = [
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__globals__}'.format(lipsum) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ '{0[__class__]}'.format(messages[0]) }}",
    "{{ ('{0.__globals__}' | attr('format'))(lipsum) }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(lipsum) }}",
    "{{ dict(f='{0.__globals__}'.format).f(lipsum) }}",
    "{% set ns = namespace(f='{0.__globals__}'.format) %}{{ ns.f(lipsum) }}",
    "{{ ['{0.__globals__}'.format] | map('string') | list | length }}",
    "{{ ('{0.__class__.__mro__}' | string | attr('format'))('x') }}",
    "{{ ('{0.__globals__}' | safe).format(lipsum) }}",
    "{{ '%s' | format(lipsum.__globals__) }}",
    "{{ '%(x)s' % {'x': lipsum.__globals__} }}",
    "{{ ['{0.__globals__}'] | map('format', lipsum) | list }}",
]
IMPORTS = [
    "{% import 'os' as os %}{{ os.environ }}",
    "{% from 'os' import environ %}{{ environ }}",
    "{% include '/etc/passwd' %}",
    "{% include 'SECRET_FILE' %}",
    "{% include '../secret.txt' ignore missing %}",
    "{% extends 'SECRET_FILE' %}",
    "{% import messages[0].content as x %}{{ x }}",
    "{{ __import__('os').environ }}",
    "{{ open('SECRET_FILE').read() }}",
    "{{ eval('1') }}{{ exec('1') }}{{ compile('1', '', 'eval') }}",
    "{% debug %}",
    "{% do messages.clear() %}",
]
STATE = [
    "{{ messages.append({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(content='changed') }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set messages[0].content = 'changed' %}",
    "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace() %}{% set ns.__init__ = lipsum %}{{ ns.__init__.__globals__ }}",
    "{{ namespace(**{'_Namespace__attrs': 1}) }}",
    "{{ namespace()._Namespace__attrs.__class__ }}",
    "{{ dict(__class__=1).__class__ }}",
    "{{ dict.fromkeys(['__class__']).__class__.__mro__ }}",
]
LIMITS = [
    "{{ range(1000000000) | list }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 1 // 0 }}",
    "{{ lipsum | tojson }}",
    "{{ messages | tojson(indent=lipsum) }}",
    "{{ raise_exception('stop') }}",
    "{{ raise_exception(lipsum.__globals__) }}",
    "{{ unclosed",
    "{% for %}",
    "{{ messages | no_such_filter }}",
]
PAYLOADS = [
    payload
    for group in (ATTRIBUTE_CHAINS, ATTR_FILTERS, FORMAT_TRICKS, IMPORTS, STATE, LIMITS)
    for payload in group
]

_FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "shutil.", "urllib.", "webbrowser.", "pickle."),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename"),
    *("os.mkdir", "os.rmdir", "os.putenv", "os.chmod", "os.link", "os.symlink", "os.listdir"),
)


class Watch:
    """An audit hook: notes and refuses what a template has no business with."""

    def __init__(self, own_folder: str) -> None:
        paths = sysconfig.get_paths()
        # Modules may be imported late, from where Python's modules are.
        self.roots = (paths["stdlib"], paths["purelib"], paths["platlib"], own_folder)
        self.active = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, _ = arguments
            reads = mode is None or set(str(mode)) <= set("rbtU")
            allowed = reads and str(path).startswith(self.roots)
        elif event == "exec":
            code = arguments[0]
            allowed = self._is_code_of_jinja(code.co_filename, code.co_names == (RAISE,))
        elif event == "compile":
            source, name = arguments
            name = name.decode() if isinstance(name, bytes) else str(name)
            # The lexer reads numbers with ast.literal_eval.
            harmless = rf"raise {RAISE}|[\d.]+".encode()
            fine = source is None or re.fullmatch(harmless, source) is not None
            allowed = self._is_code_of_jinja(name, fine)
        else:
            allowed = not event.startswith(_FORBIDDEN)
        if not allowed:
            self.seen.append(f"{event} {arguments!r}"[:200])
            raise PermissionError(f"audit: {event}")

    def _is_code_of_jinja(self, name: str, raises: bool) -> bool:
        """A compiled template, an imported module, or the one statement that jinja makes up to give
        an error the template's line."""
        return (
            name == "<template>" or name.startswith(self.roots) or (name == "<unknown>" and raises)
        )


def main(folder: str) -> None:
    import exafuse.text.template
    from exafuse import TemplateError
    from exafuse.text.chat import encode_chat, load_processor

    os.environ["EXAFUSE_SECRET"] = CANARY
    secret = os.path.join(folder, "secret.txt")
    with open(secret, "w") as file:
        file.write(CANARY)
    tokenizer = load_processor(folder)
    messages = [
        {"role": "user", "content": "SECRET_FILE"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ]
    benign = tokenizer.chat_template
    expected = encode_chat(tokenizer, messages)
    watch = Watch(os.path.dirname(os.path.dirname(exafuse.text.template.__file__)))
    sys.addaudithook(watch)
    for payload in PAYLOADS:
        tokenizer.chat_template = payload.replace("SECRET_FILE", secret)
        before = json.dumps(messages)
        watch.seen.clear()
        watch.active = True
        start = time.perf_counter()
        try:
            outcome = {"text": tokenizer.decode(encode_chat(tokenizer, messages))}
        except TemplateError as error:
            outcome = {"error": str(error)}
        except BaseException as error:
            outcome = {"escaped": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - start
        watch.active = False
        report = {
            "seconds": seconds,
            "touched": watch.seen,
            "changed": json.dumps(messages) != before,
        }
        print(json.dumps({"payload": payload, **outcome, **report}))
    tokenizer.chat_template = benign
    print(json.dumps({"unharmed": encode_chat(tokenizer, messages) == expected}))
    # The watch itself: it must see what it is for.
    watch.active = True
    attempts = (lambda: os.open("/etc/passwd", 0), lambda: os.system("true"), lambda: exec("1"))
    for attempt in attempts:
        try:
            attempt()
        except PermissionError as error:
            print(json.dumps({"refused": str(error)}))


if __name__ == "__main__":
    main(sys.argv[1])
