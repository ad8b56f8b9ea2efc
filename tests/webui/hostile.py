"""A hundred texts that try to run a script, to load something, to leave their element or to break a parser.

Each that runs calls `pwned()`, which no page has.
"""

from __future__ import annotations

RUN = "pwned()"
HTML = [
    f"<script>{RUN}</script>",
    f"<ScRiPt>{RUN}</sCrIpT>",
    f"</script><script>{RUN}</script>",
    f"<script src=data:,{RUN}></script>",
    f"<script type=module>{RUN}</script>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"<script/x>{RUN}</script>",
    f"<<script>{RUN}//<</script>",
    f"<img src=x onerror={RUN}>",
    f'<img src="x" onerror="{RUN}">',
    f"<img/src/onerror={RUN}>",
    f"<IMG SRC=x OnErRoR={RUN}>",
    f"<img src=x onerror='{RUN}'//",
    f'"><img src=x onerror={RUN}>',
    f"'><img src=x onerror={RUN}>",
    f"</title><img src=x onerror={RUN}>",
    f"</textarea><img src=x onerror={RUN}>",
    f"--><img src=x onerror={RUN}>",
    f"]]><img src=x onerror={RUN}>",
    f"<image src=x onerror={RUN}>",
    f"<svg onload={RUN}>",
    f"<svg/onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><a xlink:href='javascript:{RUN}'><text y=20>x</text></a></svg>",
    f"<svg><use href='data:image/svg+xml,<svg id=x onload={RUN}>#x'/></svg>",
    f"<svg><foreignObject><body onload={RUN}></foreignObject></svg>",
    f"<svg><style><img src=x onerror={RUN}></style></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    f"<math><mi xlink:href='javascript:{RUN}'>x</mi></math>",
    f"<math><a href=javascript:{RUN}>x</a></math>",
    f"<form><math><mtext></form><form><mglyph><style></math><img src onerror={RUN}>",
    f"<iframe src=javascript:{RUN}></iframe>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<object data=javascript:{RUN}></object>",
    f"<embed src=javascript:{RUN}>",
    f"<frameset onload={RUN}>",
    f"<body onload={RUN}>",
    f"<body onpageshow={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f"<video src=x onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}></audio>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<input autofocus onfocus={RUN}>",
    f"<select autofocus onfocus={RUN}>",
    f"<textarea autofocus onfocus={RUN}>",
    f"<button autofocus onfocus={RUN}>x</button>",
    f"<a href=javascript:{RUN}>x</a>",
    f"<a href='java\tscript:{RUN}'>x</a>",
    f"<a href='&#106;avascript:{RUN}'>x</a>",
    f"<a href='\x01javascript:{RUN}'>x</a>",
    f"<marquee onstart={RUN}>x</marquee>",
    f'<div style="background:url(javascript:{RUN})">x</div>',
    f'<div style="animation-name:x" onanimationstart={RUN}>x</div>',
    f"<style>@keyframes x{{}}*{{animation:x}}</style><p onanimationstart={RUN}>",
    "<style>body{display:none}</style>",
    "<style>@import 'http://evil.invalid/x.css';</style>",
    "<link rel=stylesheet href=http://evil.invalid/x.css>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<base href=http://evil.invalid/>",
    f"<template><script>{RUN}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"<xmp><p title='</xmp><img src=x onerror={RUN}>'>",
    f"<isindex type=image src=x onerror={RUN}>",
    f"<keygen autofocus onfocus={RUN}>",
    f"<p id=log></p><form id=text><input name=value></form>{RUN}",
]
MARKDOWN = [
    f"[x](javascript:{RUN})",
    f"[x](JaVaScRiPt:{RUN})",
    f"[x](java\nscript:{RUN})",
    f"[x]( javascript:{RUN})",
    f"[x](&#106;avascript:{RUN})",
    f"[x](<javascript:{RUN}>)",
    f"[x](data:text/html,<script>{RUN}</script>)",
    f"[x](vbscript:{RUN})",
    f'[x](//evil.invalid" onmouseover={RUN} x=")',
    f"[x](http://a.invalid 'y\" onmouseover=\"{RUN}')",
    f"[x]: javascript:{RUN}\n\n[x]",
    f'![x](x" onerror="{RUN})',
    "![x](http://evil.invalid/x.png)",
    f"![x](javascript:{RUN})",
    f"<javascript:{RUN}>",
    f'<http://a.invalid/" onmouseover="{RUN}>',
    f'```" onmouseover="{RUN}\n<img src=x onerror={RUN}>\n```',
    f"```<img src=x onerror={RUN}>\nx\n```",
    f"`<img src=x onerror={RUN}>`",
    f"| <img src=x onerror={RUN}> | a |\n|:-|-:|\n| <script>{RUN}</script> | b |",
    f"> <img src=x onerror={RUN}>",
    f"- <svg onload={RUN}>",
    f"# <script>{RUN}</script>",
    f"**<b onclick={RUN}>x</b>**",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"\\<img src=x onerror={RUN}>",
    f"<!-- --!><img src=x onerror={RUN}>",
    f"<![CDATA[<img src=x onerror={RUN}>]]>",
    f"<?php <img src=x onerror={RUN}> ?>",
]
OTHER = [
    "__proto__",
    "constructor",
    f"\u2028{RUN}\u2029",
    f"${{{RUN}}} {{{{{RUN}}}}}",
    "\u202e\u0000\ufffe\ufeff]]>",
]
CORPUS = [*HTML, *MARKDOWN, *OTHER]
assert len(CORPUS) == len(set(CORPUS)) >= 100, len(CORPUS)

# What a page says that ran or was kept from running; then what is in the document that must not be.
WATCH = """
window.ran = [];
window.pwned = () => ran.push('ran');
window.alert = pwned;
document.addEventListener('securitypolicyviolation', (e) => ran.push(`${e.violatedDirective} ${e.blockedURI}`));
"""
SCAN = """(() => {
  const found = [];
  for (const node of document.querySelectorAll('*')) {
    for (const {name, value} of node.attributes) {
      const isOurs = name !== 'style' || node.matches('textarea, .bar, .menu, .thought, .tip');
      const isScript = /^on/i.test(name) || /^\\s*(javascript|data|vbscript):/i.test(value);
      if (isScript || !isOurs) found.push(`${node.tagName} ${name}=${value}`);
    }
    if (/^(IFRAME|OBJECT|EMBED|IMG|STYLE|BASE|FRAME|VIDEO|AUDIO|MATH)$/i.test(node.tagName)) found.push(node.tagName);
    if (node.tagName === 'SCRIPT' && !node.src.startsWith(location.origin + '/static/')) found.push('SCRIPT');
  }
  return found;
})()"""
