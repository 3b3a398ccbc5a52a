/** Makes HTML elements. */

/**
 * An element with properties, attributes (names with "-" or "role") and children.
 * @param {string} tag
 * @param {Object} properties
 * @param {...(Node|string)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Sets a text only where it changed: an unchanged one costs the browser no layout. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Links a stylesheet once; `address` is absolute. */
export function linkStyle(address) {
  if ([...document.styleSheets].some((sheet) => sheet.href === address)) return;
  if (document.querySelector(`link[href="${address}"]`)) return;
  document.head.append(element("link", { rel: "stylesheet", href: address }));
}
